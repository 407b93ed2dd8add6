"""libvirt's lease files, written by its helper for dnsmasq (src/network/leaseshelper.c).

`/var/lib/libvirt/dnsmasq/BRIDGE.status` is a JSON array; it is empty, or an empty array, while there
are no leases, and holds IPv6 leases too:

    [{"ip-address": "192.168.122.23", "mac-address": "52:54:00:12:34:56", "hostname": "box",
      "client-id": "01:52:54:00:12:34:56", "expiry-time": 1764000000}]

Older versions had dnsmasq write its own file, `NETWORK.leases` (see `dnsmasq`).
"""

from __future__ import annotations

import json
from typing import Any

from hostos.machine.leases.model import Lease, parse_address, parse_mac


def parse(text: str) -> list[Lease]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        # Empty, or read while it was written.
        return []
    found = [_lease(each) for each in content if isinstance(each, dict)] if isinstance(content, list) else []
    return [lease for lease in found if lease is not None]


def _lease(entry: dict[str, Any]) -> Lease | None:
    address = parse_address(str(entry.get("ip-address", "")))
    expires = entry.get("expiry-time", 0)
    if address is None or isinstance(expires, bool) or not isinstance(expires, int | float):
        return None
    hostname = entry.get("hostname", "")
    mac = parse_mac(str(entry.get("mac-address", "")))
    return Lease(address, mac, hostname if isinstance(hostname, str) else "", float(expires) or None)
