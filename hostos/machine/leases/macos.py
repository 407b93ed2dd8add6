"""macOS's `/var/db/dhcpd_leases`, written by bootpd for its own virtual machines (vmnet).

    {
        name=box
        ip_address=192.168.64.5
        hw_address=1,52:54:0:2:d8:f0
        identifier=1,52:54:0:2:d8:f0
        lease=0x6a05ad86
    }

Octets have no leading zeros. The newest entry comes first, and older ones of the same client stay.
`lease` is when it expires (hexadecimal). `hw_address` is the client identifier, so for a client that
sends an IAID and a DUID (`ff,…`) it has the MAC address only if the DUID does; its name is what is
left. The file is replaced as a whole, and absent until the first lease.
"""

from __future__ import annotations

from hostos.machine.leases.model import Lease, mac_of_client_id, parse_address


def parse(text: str) -> list[Lease]:
    leases = []
    entry: dict[str, str] | None = None
    for line in text.splitlines():
        line = line.strip()
        if line == "{":
            entry = {}
        elif line == "}":
            lease = _lease(entry) if entry else None
            if lease is not None:
                leases.append(lease)
            entry = None
        elif entry is not None:
            name, _, value = line.partition("=")
            entry.setdefault(name.strip(), value.strip())
    return leases


def _lease(entry: dict[str, str]) -> Lease | None:
    address = parse_address(entry.get("ip_address", ""))
    if address is None:
        return None
    try:
        expires = float(int(entry["lease"], 16)) if "lease" in entry else None
    except (ValueError, OverflowError):
        return None
    mac = None
    for name in ("hw_address", "identifier"):
        mac = mac or mac_of_client_id(_octets(entry.get(name, "")))
    return Lease(address, mac, entry.get("name", ""), expires)


def _octets(text: str) -> bytes:
    """`ff,0:2:d8` as bytes; b"" if it is not that."""
    try:
        return bytes(int(octet, 16) for octet in text.replace(",", ":", 1).split(":"))
    except ValueError:
        return b""
