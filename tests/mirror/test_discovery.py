"""Local discovery when it is told too much, or of others."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from zeroconf import ServiceInfo, Zeroconf

from hostos.mirror.cluster import Cluster
from hostos.mirror.discovery import SERVICE, Discovery
from hostos.mirror.ledger import Ledger
from hostos.mirror.peers import MAX_FOUND, Peers
from hostos.mirror.rate import Rate
from mirror.cache import SCALE

LOOPBACK = "127.0.0.1"


@pytest.fixture
def peers(tmp_path) -> Iterator[Peers]:
    ledger = Ledger(tmp_path / "ledger.db")
    yield Peers(ledger, Cluster(), None, Rate(0), lambda _: None)  # type: ignore[arg-type]
    ledger.close()


@contextmanager
def announced(count: int, *, cluster: str = "open", port: int = 20_000) -> Iterator[Zeroconf]:
    """Somebody who says that many are there."""
    zeroconf = Zeroconf(interfaces=[LOOPBACK])
    try:
        for number in range(count):
            name = secrets.token_hex(8)
            info = ServiceInfo(
                SERVICE, f"{name}.{SERVICE}", port=port + number, parsed_addresses=["127.0.0.5"],
                properties={"id": name, "cluster": cluster}, server=f"hostos-{name}.local.",
            )  # fmt: skip
            zeroconf.registry.async_add(info)
            zeroconf.send(zeroconf.generate_service_broadcast(info, 120))
        yield zeroconf
    finally:
        # No good-bye: `close` of a registry that is empty sends none.
        for info in zeroconf.registry.async_get_service_infos():
            zeroconf.registry.async_remove(info)
        zeroconf.close()


def watch(peers: Peers, until, seconds: float, tag: Cluster | None = None) -> bool:
    """Look for peers until something holds of them."""

    async def look() -> bool:
        discovery = Discovery(LOOPBACK, 0, tag or Cluster(), peers, lambda _: None)
        await discovery.start()
        try:
            for _ in range(int(seconds * SCALE / 0.1)):
                if until():
                    return True
                await asyncio.sleep(0.1)
            return bool(until())
        finally:
            await discovery.close()

    return asyncio.run(look())


def test_a_flood(peers):
    peers.add("127.0.0.6", 1, "static")
    with announced(200):
        assert watch(peers, lambda: len(peers.known) >= MAX_FOUND + 1, 20)
        # No more come, and who was known is.
        watch(peers, lambda: False, 2)
    assert sum(peer.origin == "lan" for peer in peers.known.values()) == MAX_FOUND
    assert "127.0.0.6:1" in peers.known


def test_another_cluster_is_left_alone(peers):
    ours = Cluster(b"k" * 32)
    with announced(1, cluster=ours.tag), announced(1, port=30_000), announced(1, cluster="other", port=40_000):
        assert watch(peers, lambda: peers.known, 10, ours)
        watch(peers, lambda: False, 1, ours)
    assert list(peers.known) == ["127.0.0.5:20000"]
