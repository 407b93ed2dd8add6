"""The peers that are known: by address, by local discovery; whom to ask, and whom not (again).

A peer that doesn't answer is left alone for a while, longer each time; one that lied, for a week.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from hostos.mirror.cluster import Cluster
from hostos.mirror.ledger import Ledger
from hostos.mirror.rate import Rate
from hostos.mirror.settings import join_address
from hostos.mirror.sources import PEER_TIMEOUT, Source

MAX_FOUND = 64
"""Peers that local discovery may add; a flood of announcements replaces none that is known."""
FIRST_PAUSE_S, LAST_PAUSE_S = 2.0, 300.0


@dataclass
class Peer:
    """`origin`: how it was found (`static`, `lan`, `dht`)."""

    address: str
    origin: str
    failures: int = 0
    not_before: float = 0.0
    reason: str = ""


@dataclass
class Peers:
    ledger: Ledger
    cluster: Cluster
    session: aiohttp.ClientSession
    rate: Rate
    log: Callable[[str], None]
    known: dict[str, Peer] = field(default_factory=dict)

    def add(self, host: str, port: int, origin: str) -> None:
        address = join_address(host, port)
        if address in self.known:
            return
        if origin == "lan" and sum(peer.origin == "lan" for peer in self.known.values()) >= MAX_FOUND:
            return
        self.known[address] = Peer(address, origin)
        self.log(f"peer {address} ({origin})")

    def remove(self, host: str, port: int) -> None:
        """It said good-bye; a peer given by address stays."""
        address = join_address(host, port)
        if (peer := self.known.get(address)) and peer.origin == "lan":
            del self.known[address]

    def usable(self) -> list[str]:
        """Addresses to ask now, in random order."""
        now = time.monotonic()
        found = [
            address
            for address, peer in self.known.items()
            if peer.not_before <= now and not self.ledger.is_liar(address)
        ]
        random.shuffle(found)
        return found

    def source(self, address: str, sha256: str, size: int, received: Callable[[int], None]) -> Source:
        def count(number: int) -> None:
            self.ledger.count_peer(address, received=number)
            received(number)
            if (peer := self.known.get(address)) and peer.failures:
                peer.failures, peer.reason = 0, ""

        url = f"http://{address}/sha256/{sha256}"
        return Source(f"peer:{address}", url, size, self.session, PEER_TIMEOUT, self.rate, count, cluster=self.cluster)

    def failed(self, address: str, reason: str, *, lied: bool) -> None:
        if lied:
            self.ledger.lied(address)
            self.log(f"peer {address} is dropped: it {reason}")
        if peer := self.known.get(address):
            peer.failures += 1
            peer.reason = reason
            peer.not_before = time.monotonic() + min(LAST_PAUSE_S, FIRST_PAUSE_S * 2 ** (peer.failures - 1))

    def describe(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        return [
            {
                "address": peer.address,
                "found": peer.origin,
                "liar": self.ledger.is_liar(peer.address),
                "resting": max(0.0, round(peer.not_before - now, 1)),
                "reason": peer.reason,
            }
            for peer in self.known.values()
        ]
