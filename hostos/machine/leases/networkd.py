"""The lease file of systemd-networkd's DHCP server (sd-dhcp-server-lease.c, dhcp_server_save_leases).

`/var/lib/systemd/network/dhcp-server-lease/INTERFACE`, or below `/run/systemd/netif/` with
`PersistLeases=runtime`: a JSON object, replaced as a whole and absent while there are no leases.

    {"BootID": "…", "Address": [192,168,77,1], "PrefixLength": 24, "Leases": [
      {"ClientId": [1,82,84,0,18,52,86], "Address": [192,168,77,23], "Hostname": "box",
       "HardwareAddressType": 1, "HardwareAddress": [82,84,0,18,52,86],
       "ExpirationUSec": 5123456789, "ExpirationRealtimeUSec": 1764000000000000}]}

Times are microseconds; ExpirationUSec counts from the boot named by BootID and is not used where the
other is there. systemd 256 wrote ClientId without hardware address.
"""

from __future__ import annotations

import json
from typing import Any

from hostos.machine.leases.model import ETHERNET, Lease, format_mac, mac_of_client_id, parse_address

# USEC_INFINITY, and whatever else no clock shows.
_NEVER = 1 << 62


def parse(text: str) -> list[Lease]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return []
    entries = content.get("Leases") if isinstance(content, dict) else None
    found = [_lease(each) for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
    return [lease for lease in found if lease is not None]


def _lease(entry: dict[str, Any]) -> Lease | None:
    octets = _octets(entry.get("Address"))
    address = parse_address(".".join(map(str, octets))) if octets else None
    if address is None:
        return None
    hardware = _octets(entry.get("HardwareAddress"))
    if hardware and len(hardware) == 6 and entry.get("HardwareAddressType", ETHERNET) == ETHERNET:
        mac: str | None = format_mac(hardware)
    else:
        mac = mac_of_client_id(_octets(entry.get("ClientId")) or b"")
    hostname = entry.get("Hostname", "")
    until = entry.get("ExpirationRealtimeUSec")
    expires = until / 1e6 if isinstance(until, int) and 0 < until < _NEVER else None
    return Lease(address, mac, hostname if isinstance(hostname, str) else "", expires)


def _octets(value: Any) -> bytes | None:
    try:
        return bytes(value) if isinstance(value, list) else None
    except (TypeError, ValueError):
        return None
