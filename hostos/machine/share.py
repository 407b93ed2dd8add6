"""Directories of the host inside the machine (docs/storage.md), over QEMU's 9p server."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hostos.errors import UserError

# Beyond these the guest's own system would be covered.
_SYSTEM = ("bin", "boot", "dev", "etc", "init", "lib", "lib64", "proc", "run", "sbin", "sys", "usr")
_SYSTEM_ITSELF = ("/", "/root", "/root/.ssh", "/var", "/var/lib", "/var/lib/hostos", "/tmp")
_MODE = re.compile(r"(.*):(ro|rw)", re.S)


@dataclass(frozen=True)
class Share:
    """`host` of this host is `guest` in the machine."""

    host: Path
    guest: str
    read_only: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.guest}" + (":ro" if self.read_only else "")


def parse_share(text: str) -> Share:
    """`HOST[:GUEST][:ro]`; GUEST is where HOST is on the host unless it is given. Raises UserError.

    A directory that exists with a colon in its name is taken as it is.
    """
    match = _MODE.fullmatch(text)
    rest, read_only = (match[1], match[2] == "ro") if match else (text, False)
    host, guest = rest, ""
    if not Path(rest).expanduser().is_dir() and ":/" in rest:
        host, _, guest = rest.rpartition(":/")
        guest = f"/{guest}"
    path = Path(host).expanduser().absolute()
    return Share(path, _clean(guest or str(path), text), read_only)


def _clean(guest: str, text: str) -> str:
    inside = str(PurePosixPath(os.path.normpath("/" + guest.lstrip("/"))))
    hint = "say where: --share HOST:/mnt/NAME"
    if any(character in inside for character in "\n\r\0") or len(os.fsencode(inside)) > 1024:
        raise UserError(f"--share {text!r}: {inside!r} is no place in the guest", hint)
    if inside in _SYSTEM_ITSELF or inside.split("/")[1] in _SYSTEM:
        raise UserError(f"--share {text!r} would cover {inside} of the guest's own system", hint)
    return inside


def check_shares(shares: tuple[Share, ...]) -> None:
    """Raises UserError for what cannot be shared."""
    seen: set[str] = set()
    for share in shares:
        if not share.host.exists():
            raise UserError(f"{share.host} does not exist, so it cannot be shared", f"mkdir -p {share.host}")
        if not share.host.is_dir():
            raise UserError(f"{share.host} is not a directory", "share the directory it is in")
        if not os.access(share.host, os.R_OK | os.X_OK):
            raise UserError(f"{share.host} cannot be read", "share a directory of yours")
        if share.guest in seen:
            raise UserError(f"two shares are to be {share.guest} in the guest", "say where: --share HOST:GUEST")
        seen.add(share.guest)


def options(shares: tuple[Share, ...]) -> list[list[str]]:
    """QEMU's options.

    A QEMU that runs as root must not let the guest make device files or set-uid programs of the
    host's root: owner and mode then are kept in extended attributes (`mapped-xattr`). Otherwise the
    host's own rules hold and files are what they look like (`none`).
    """
    lines = []
    for number, share in enumerate(shares):
        mapped = os.geteuid() == 0 and not share.read_only
        model = "mapped-xattr,fmode=0644,dmode=0755" if mapped else "none"
        path = str(share.host).replace(",", ",,")
        readonly = ",readonly=on" if share.read_only else ""
        lines += [
            ["-fsdev", f"local,id=share{number},path={path},security_model={model}{readonly},multidevs=remap"],
            ["-device", f"virtio-9p-pci,fsdev=share{number},mount_tag={tag(number)}"],
        ]
    return lines


def tag(number: int) -> str:
    return f"hostos{number}"
