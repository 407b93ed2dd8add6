"""What every lease file says, whoever wrote it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

ETHERNET = 1
# RFC 4361: a client identifier that is an IAID and a DUID.
_RFC4361 = 255
_MAC = re.compile(r"[0-9A-Fa-f]{1,2}(?:[:-][0-9A-Fa-f]{1,2}){5}")


@dataclass(frozen=True)
class Lease:
    """One address given to one client.

    `mac` is None if the file only has an identifier that does not tell it, `hostname` "" if the
    client sent none; `expires` in seconds since 1970, None for never. Of two leases of one client
    the one with the later `expires` is the newer one, else the one that comes first.
    """

    address: str
    mac: str | None
    hostname: str = ""
    expires: float | None = None

    def current(self, now: float) -> bool:
        return self.expires is None or self.expires > now


def parse_mac(text: str) -> str | None:
    """`2:D8:0:1:2:3` as `02:d8:00:01:02:03`; None for anything else."""
    if not _MAC.fullmatch(text):
        return None
    return ":".join(f"{int(octet, 16):02x}" for octet in re.split("[:-]", text))


def parse_address(text: str) -> str | None:
    """An IPv4 address a client can have; None for anything else."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return None
    return None if address.is_unspecified or address.is_multicast or address.is_loopback else str(address)


def format_mac(octets: bytes) -> str:
    return ":".join(f"{octet:02x}" for octet in octets)


def mac_of_client_id(identifier: bytes) -> str | None:
    """The MAC address a DHCP client identifier (option 61) contains, if it does.

    Type 1 is the MAC address itself (RFC 2132, 9.14). Type 255 is an IAID of 4 bytes and a DUID
    (RFC 4361); of the kinds of DUID (RFC 8415, 11) DUID-LLT and DUID-LL end with a MAC address.
    systemd's DUID-EN does not.
    """
    kind, rest = identifier[:1], identifier[1:]
    if kind == bytes([ETHERNET]) and len(rest) == 6:
        return format_mac(rest)
    if kind != bytes([_RFC4361]):
        return None
    duid = rest[4:]
    if duid[2:4] != b"\0\1":
        return None
    start = {b"\0\1": 8, b"\0\3": 4}.get(duid[:2])
    return format_mac(duid[start:]) if start and len(duid) == start + 6 else None
