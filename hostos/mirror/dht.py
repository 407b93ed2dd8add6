"""Finding peers in a DHT, opt-in: who has a file announces it there under a key made from its hash.

libtorrent's DHT node (BEP 5: announce_peer, get_peers); no torrent is involved, the port announced is
that of the peers' HTTP server. It joins by the nodes that the user named, and knows no others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import libtorrent

from hostos.mirror.cluster import Cluster

FIND_S = 3.0
"""How long an answer is waited for."""
ASK_EVERY_S = 0.5
"""Asked again: a node that has just started knows nobody yet."""
AGAIN_S = 600.0
"""How long what was found is taken as it was."""
ANNOUNCE_S = 25 * 60.0
"""Nodes forget an announcement after 30 minutes (BEP 5 leaves it open; libtorrent's own time)."""
ANNOUNCES_PER_S = 10
MAX_CACHED = 4096
MAX_FOUND = 64
"""Addresses that are taken for one file; anybody may announce anything."""
POLL_S = 0.02


class Finder:
    """`host`, `port`: of the peers' HTTP server, empty and 0 if it serves none, and hence announces
    nothing; `has`: is the file (still) in the store?"""

    def __init__(
        self, host: str, nodes: list[tuple[str, int]], cluster: Cluster, port: int, has: Callable[[str], bool]
    ) -> None:
        self.cluster, self.port, self._has = cluster, port, has
        loopback = [name.startswith("127.") or name == "::1" for name in (host, *dict(nodes))]
        self._on_loopback = any(loopback)
        # libtorrent's 0.0.0.0 is every address but the loopback's.
        host = host or ("127.0.0.1" if all(loopback[1:]) else "0.0.0.0")
        self.session: Any = libtorrent.session(
            {
                # Any port: libtorrent would want TCP on it, too, where the peers' server is.
                "listen_interfaces": f"[{host}]:0" if ":" in host else f"{host}:0",
                "enable_dht": True,
                "enable_lsd": False,
                "enable_upnp": False,
                "enable_natpmp": False,
                "dht_bootstrap_nodes": "",
                "dht_restrict_routing_ips": False,
                "dht_restrict_search_ips": False,
                "alert_mask": libtorrent.alert.category_t.dht_notification
                | libtorrent.alert.category_t.dht_operation_notification,
            }
        )
        for node in nodes:
            self.session.add_dht_node(node)
        self._nodes = nodes
        self._due: OrderedDict[str, float] = OrderedDict()
        self._found: OrderedDict[str, tuple[float, set[tuple[str, int]]]] = OrderedDict()
        self._waiting: dict[bytes, set[tuple[str, int]]] = {}

    def announce(self, sha256: str) -> None:
        """Say from now on that this file is here."""
        if self.port and sha256 not in self._due:
            self._due[sha256] = 0.0
            # Before all that are announced already, which come in the order in which they are due again.
            self._due.move_to_end(sha256, last=False)

    async def find(self, sha256: str) -> set[tuple[str, int]]:
        """(address, port) of who said that it has the file."""
        cached = self._found.get(sha256)
        if cached and time.monotonic() - cached[0] < AGAIN_S:
            return cached[1]
        key = self.cluster.swarm_key(sha256)
        found = self._waiting.setdefault(key, set())
        until = ask = time.monotonic()
        until += FIND_S
        while (now := time.monotonic()) < until and not found:
            if now >= ask:
                self.session.dht_get_peers(libtorrent.sha1_hash(key))
                ask = now + ASK_EVERY_S
            await asyncio.sleep(POLL_S)
        self._waiting.pop(key, None)
        if found:
            self._found[sha256] = (time.monotonic(), found)
            while len(self._found) > MAX_CACHED:
                self._found.popitem(last=False)
        return found

    async def run(self) -> None:
        """Announces what is due, and reads what comes; until cancelled."""
        allowance = 1.0
        while True:
            for alert in self.session.pop_alerts():
                if isinstance(alert, libtorrent.dht_get_peers_reply_alert):
                    key = bytes.fromhex(str(alert.info_hash))
                    if (found := self._waiting.get(key)) is not None:
                        said = [(str(host), int(port)) for host, port in alert.peers() if self._plausible(host, port)]
                        random.shuffle(said)
                        found.update(said[: MAX_FOUND - len(found)])
            allowance = min(allowance + ANNOUNCES_PER_S * POLL_S, ANNOUNCES_PER_S)
            now = time.monotonic()
            while self._due and allowance >= 1:
                sha256, due = next(iter(self._due.items()))
                if due > now:
                    break
                if not self._has(sha256):
                    del self._due[sha256]
                    continue
                self.session.dht_announce(libtorrent.sha1_hash(self.cluster.swarm_key(sha256)), self.port, 0)
                self._due[sha256] = now + ANNOUNCE_S
                self._due.move_to_end(sha256)
                allowance -= 1
            await asyncio.sleep(POLL_S)

    def _plausible(self, host: str, port: int) -> bool:
        """Anybody may announce anything: not an address of this host, unless we are there ourselves."""
        address = ipaddress.ip_address(host)
        return 0 < port < 65536 and not address.is_unspecified and (not address.is_loopback or self._on_loopback)

    def status(self) -> dict[str, Any]:
        return {
            "nodes": [f"{host}:{port}" for host, port in self._nodes],
            "announced": sum(due > 0 for due in self._due.values()),
        }
