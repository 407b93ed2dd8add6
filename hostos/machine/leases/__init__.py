"""Where a machine on a bridge got which address: DHCP servers' lease files, watched.

A `LeaseSource` tells the leases it knows now. A `LeaseFile` is one: read by its path each time it has
changed, since servers replace it; it may not exist yet; what is cut off while it is written is left
out and is there the next time. docs/network.md lists the files.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hostos.errors import UserError
from hostos.machine.leases import dnsmasq, isc, libvirt, macos, networkd
from hostos.machine.leases.model import Lease

__all__ = [
    "ABSENT",
    "FORMATS",
    "Found",
    "Lease",
    "LeaseFile",
    "LeaseSource",
    "default_sources",
    "detect",
    "find",
    "named_source",
]

Parser = Callable[[str], list[Lease]]
FORMATS: dict[str, Parser] = {
    "dnsmasq": dnsmasq.parse,
    "isc": isc.parse,
    "libvirt": libvirt.parse,
    "networkd": networkd.parse,
    "macos": macos.parse,
}
# The fault of a file that is not there (yet).
ABSENT = "not there"
MAC_LEASES = Path("/var/db/dhcpd_leases")
# Seconds within which a file system may give two changes the same time (FAT: 2 s).
_GRANULARITY = 2.0
# More is not a lease file.
_LARGEST = 64 << 20
_ISC = re.compile(r"^\s*(lease\s+[0-9.]+\s*\{|server-duid|authoring-byte-order|failover\s|host\s|#.*dhcpd)", re.M)


class LeaseSource(Protocol):
    """Something that knows leases. `name` tells people what and where it is."""

    @property
    def name(self) -> str: ...

    def leases(self) -> Sequence[Lease]:
        """All it knows now, expired ones too, the newest first among those that expire together."""
        ...

    @property
    def fault(self) -> str:
        """Why the last `leases()` found nothing, "" if nothing was wrong."""
        ...


@dataclass
class LeaseFile:
    """A lease file; `format` is a key of FORMATS, or "" to find out from what is in it."""

    path: Path
    format: str = ""
    fault: str = field(default="", init=False)
    _seen: tuple[int, ...] | None = field(default=None, init=False)
    _leases: Sequence[Lease] = field(default=(), init=False)

    @property
    def name(self) -> str:
        return f"{self.path} ({self.format})" if self.format else str(self.path)

    @property
    def spec(self) -> str:
        """As `named_source` takes it."""
        return f"{self.format}:{self.path}" if self.format else str(self.path)

    def leases(self) -> Sequence[Lease]:
        try:
            with self.path.open("rb") as stream:
                status = _status(stream.fileno())
                if status != self._seen:
                    text = stream.read(_LARGEST).decode("utf-8", "replace")
                    # Not read again until it changes; but a change right after this one may not show in its time.
                    settled = time.time() - status[-1] / 1e9 > _GRANULARITY
                    self._seen = status if settled and _status(stream.fileno()) == status else None
                    parser = FORMATS[self.format] if self.format else detect(text)
                    self._leases = parser(text)
            self.fault = "" if self._leases else "no leases in it"
        except OSError as error:
            self._seen, self._leases = None, ()
            self.fault = ABSENT if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
        return self._leases


def _status(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def detect(text: str) -> Parser:
    """The parser for a file with this content."""
    start = text.lstrip()
    if start.startswith("["):
        return libvirt.parse
    if start.startswith("{"):
        return networkd.parse if start[1:].lstrip().startswith('"') else macos.parse
    return isc.parse if _ISC.search(text) else dnsmasq.parse


def named_source(text: str) -> LeaseFile:
    """`[FORMAT:]PATH` as `--lease-file` takes it. Raises UserError."""
    kind, colon, rest = text.partition(":")
    path = Path(rest if colon and kind in FORMATS else text).expanduser().absolute()
    if colon and kind not in FORMATS and re.fullmatch("[a-z]+", kind) and not path.exists():
        raise UserError(f"--lease-file {text!r}: there is no format {kind!r}", f"one of {', '.join(FORMATS)}")
    if path.is_dir():
        raise UserError(f"--lease-file {str(path)!r} is a directory", "name the file in it")
    return LeaseFile(path, kind if colon and kind in FORMATS else "")


def default_sources(bridge: str | None, system: str | None = None) -> tuple[LeaseFile, ...]:
    """The files in which DHCP servers keep the leases of `bridge` on this kind of host."""
    if (system or platform.system()) == "Darwin":
        return (LeaseFile(MAC_LEASES, "macos"),)
    files = []
    if bridge:
        # Those of this bridge first: what they say is said about it.
        files = [
            ("libvirt", f"/var/lib/libvirt/dnsmasq/{bridge}.status"),
            ("networkd", f"/var/lib/systemd/network/dhcp-server-lease/{bridge}"),
            ("networkd", f"/run/systemd/netif/dhcp-server-lease/{bridge}"),
            ("dnsmasq", f"/var/lib/NetworkManager/dnsmasq-{bridge}.leases"),
            ("dnsmasq", f"/var/lib/misc/dnsmasq.{bridge}.leases"),
            ("dnsmasq", f"/var/lib/incus/networks/{bridge}/dnsmasq.leases"),
            ("dnsmasq", f"/var/lib/lxd/networks/{bridge}/dnsmasq.leases"),
        ]
    files += [
        ("dnsmasq", "/var/lib/misc/dnsmasq.leases"),
        ("dnsmasq", "/var/lib/dnsmasq/dnsmasq.leases"),
        ("isc", "/var/lib/dhcp/dhcpd.leases"),
        ("isc", "/var/lib/dhcpd/dhcpd.leases"),
    ]
    return tuple(LeaseFile(Path(path), kind) for kind, path in files)


@dataclass(frozen=True)
class Found:
    """A lease and the name of the source that knew it."""

    lease: Lease
    source: str


def find(sources: Iterable[LeaseSource], mac: str, hostname: str, now: float) -> Found | None:
    """The newest unexpired lease of the client with this MAC address.

    A lease whose client's MAC address its file does not tell counts if it has the host name, after
    all that have the MAC address; one of another MAC address never does. Between equals the source
    that comes first wins.
    """
    best: Found | None = None
    best_rank: tuple[bool, float] = (False, 0.0)
    for source in sources:
        for lease in source.leases():
            if not lease.current(now):
                continue
            by_mac = lease.mac == mac.lower()
            if not by_mac and (lease.mac is not None or not hostname or not _same_host(lease.hostname, hostname)):
                continue
            rank = (by_mac, float("inf") if lease.expires is None else lease.expires)
            if best is None or rank > best_rank:
                best, best_rank = Found(lease, source.name), rank
    return best


def _same_host(name: str, hostname: str) -> bool:
    """Whether `name` is the host name or that in some domain."""
    name, hostname = name.lower().rstrip("."), hostname.lower()
    return name == hostname or name.startswith(f"{hostname}.")
