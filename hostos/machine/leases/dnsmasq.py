"""dnsmasq's lease file: one lease a line (lease.c, lease_update_file).

    1764000000 52:54:00:12:34:56 192.168.77.23 box 01:52:54:00:12:34:56

Expiry (0: never), MAC, address, hostname or `*`, client identifier or `*`. Other hardware than
Ethernet has its type before the MAC (`06-…`). A line `duid …` begins the IPv6 leases. The file is
overwritten in place and cut afterwards, so while it is read its last line can be half a line, or the
rest of an older one: only whole lines in which everything is as it must be are taken.
"""

from __future__ import annotations

from hostos.machine.leases.model import Lease, mac_of_client_id, parse_address, parse_mac


def parse(text: str) -> list[Lease]:
    leases = []
    for line in text.splitlines(keepends=True):
        fields = line.split()
        if fields[:1] == ["duid"]:
            break
        if not line.endswith("\n") or len(fields) not in (4, 5) or not (fields[0].isascii() and fields[0].isdigit()):
            continue
        address = parse_address(fields[2])
        hardware = fields[1].removeprefix("01-")
        mac = parse_mac(hardware)
        if mac is None and "*" not in hardware and "-" not in hardware:
            continue
        if mac is None and len(fields) == 5:
            mac = _mac_of(fields[4])
        if address is None:
            continue
        hostname = "" if fields[3] == "*" else fields[3]
        leases.append(Lease(address, mac, hostname, float(fields[0]) or None))
    return leases


def _mac_of(identifier: str) -> str | None:
    try:
        return mac_of_client_id(bytes.fromhex(identifier.replace(":", "")))
    except ValueError:
        return None
