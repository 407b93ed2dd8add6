"""The peers that are known: by address, by local discovery; whom to ask, and whom not (again).

A peer that doesn't answer is left alone for a while, longer each time; one that lied, for a week.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from hostos.mirror.cluster import Cluster
from hostos.mirror.ledger import Ledger
from hostos.mirror.rate import Rate
from hostos.mirror.settings import join_address
from hostos.mirror.sources import PEER_TIMEOUT, Source

MAX_FOUND = 64
"""Peers that local discovery may add (a flood of announcements replaces none that is known), and that are
remembered of those found in a DHT."""
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
        if origin == "lan" and len(self._of("lan")) >= MAX_FOUND:
            return
        self.known[address] = Peer(address, origin)
        self.log(f"peer {address} ({origin})")

    def _of(self, origin: str) -> list[Peer]:
        return [peer for peer in self.known.values() if peer.origin == origin]

    def _met(self, address: str) -> Peer:
        """A peer that was asked. One of a DHT is remembered from then on: the last `MAX_FOUND` are."""
        if address not in self.known:
            if len(before := self._of("dht")) >= MAX_FOUND:
                del self.known[before[0].address]
            self.known[address] = Peer(address, "dht")
        return self.known[address]

    def found(self, addresses: Iterable[tuple[str, int]]) -> list[str]:
        """Of those whom a DHT says to have a file, the ones to ask now."""
        said = [Peer(join_address(host, port), "dht") for host, port in addresses]
        peers = [self.known.get(peer.address, peer) for peer in said]
        # The others are asked anyway.
        return [peer.address for peer in peers if peer.origin == "dht" and self._ready(peer)]

    def _ready(self, peer: Peer) -> bool:
        return peer.not_before <= time.monotonic() and not self.ledger.is_liar(peer.address)

    def remove(self, host: str, port: int) -> None:
        """It said good-bye; a peer given by address stays."""
        address = join_address(host, port)
        if (peer := self.known.get(address)) and peer.origin == "lan":
            del self.known[address]

    def usable(self) -> list[str]:
        """Addresses to ask now for any file, in random order."""
        found = [peer.address for peer in self.known.values() if peer.origin != "dht" and self._ready(peer)]
        random.shuffle(found)
        return found

    def source(self, address: str, sha256: str, size: int, received: Callable[[int], None]) -> Source:
        def count(number: int) -> None:
            self.ledger.count_peer(address, received=number)
            received(number)
            peer = self._met(address)
            peer.failures, peer.reason = 0, ""

        url = f"http://{address}/sha256/{sha256}"
        return Source(f"peer:{address}", url, size, self.session, PEER_TIMEOUT, self.rate, count, cluster=self.cluster)

    def failed(self, address: str, reason: str, *, lied: bool) -> None:
        if lied and not self.ledger.is_liar(address):
            self.ledger.lied(address)
            self.log(f"peer {address} is dropped: it {reason}")
        peer = self._met(address)
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
