"""Peers that only a DHT tells of. Its nodes are the test's own; nothing else is contacted."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import libtorrent
import pytest

from bench.mirror import ADDRESSES, lan
from hostos.mirror import dht
from hostos.mirror.cluster import Cluster
from hostos.mirror.dht import Finder
from hostos.mirror.peers import MAX_FOUND
from hostos.mirror.upstreams import Apt
from mirror.cache import ROOT, AptClient, wait_until
from mirror.test_apt import url_of
from mirror.test_peers import liars  # noqa: F401

PORT = 45311


@contextmanager
def node(address: str, inside: list[str] | None = None) -> Iterator[str]:
    """A node that knows nobody and waits to be asked; its HOST:PORT."""
    command = [*(inside or []), sys.executable, str(ROOT / "tests/swarm/dht_node.py"), f"{address}:{PORT}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        try:
            yield f"{address}:{PORT}"
        finally:
            process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")
def test_two_caches_find_each_other(archive, trusted, make_cache, tmp_path):
    """The mirror begins while the DHT is asked, and is let alone once there is a peer."""
    archive.add("vast", 30_000_000)
    archive.publish()
    total = sum(path.stat().st_size for path in archive.packages.values())
    with lan() as net, ExitStack() as stack:
        net.serve(stack, archive.root)
        joined = stack.enter_context(node(ADDRESSES["mirror"], net.inside("mirror")))
        url = f"http://{ADDRESSES['mirror']}:8000"
        source = f"deb [signed-by={trusted}] {url} stable main"
        entry = Apt(url, ("stable",), ("main",), ("amd64",), str(trusted))
        wanted = {path.name: path.read_bytes() for path in archive.packages.values()}
        caches = {}
        for name, share in (("first", f"{ADDRESSES['first']}:3144"), ("second", "")):
            cache = make_cache(entry, inside=net.inside(name)).start(share=share, dht=(joined,))
            caches[name] = cache
            client = AptClient(tmp_path / name, [source], cache.proxy, net.inside(name))
            client.update()
            client.download("small", "middle", "large", "vast")
            assert client.debs() == wanted
            if name == "first":
                # The index and four packages.
                wait_until(lambda cache=cache: cache.status()["dht"]["announced"] == 5, 30)
        figures = {name: cache.stats()["archives"][f"{ADDRESSES['mirror']}:8000"] for name, cache in caches.items()}
        print(figures)
        assert figures["first"]["from_peers"] == 0
        assert figures["second"]["from_peers"] > 0.8 * total
        assert [(peer["address"], peer["found"]) for peer in caches["second"].status()["peers"]] == [
            (f"{ADDRESSES['first']}:3144", "dht")
        ]
        shown = caches["first"].hostos("status").stdout
        assert f"dht      joined by {joined}; 5 files announced" in shown


class Stranger:
    """Announces whatever it likes: KRPC as in BEP 5. `address`: its own."""

    def __init__(self, node: str, address: str = "127.0.0.1") -> None:
        host, _, port = node.partition(":")
        self.node = (host, int(port))
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((address, 0))
        self.socket.settimeout(10)

    def ask(self, query: bytes, **arguments: object) -> dict[bytes, object]:
        named = {name.encode(): value for name, value in arguments.items()}
        message = {b"t": b"aa", b"y": b"q", b"q": query, b"a": {b"id": os.urandom(20), **named}}
        self.socket.sendto(libtorrent.bencode(message), self.node)
        while True:
            answer = libtorrent.bdecode(self.socket.recv(4096))
            if answer.get(b"y") == b"r":
                return dict(answer[b"r"])

    def announce(self, sha256: str, port: int) -> None:
        key = Cluster().swarm_key(sha256)
        token = self.ask(b"get_peers", info_hash=key)[b"token"]
        self.ask(b"announce_peer", info_hash=key, port=port, token=token, implied_port=0)
        self.socket.close()


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_flood_of_announcements(make_cache, upstream, archive, web, liars):  # noqa: F811
    """200 who don't have it, and aren't even there, for each file; and one who has."""
    honest = liars()
    with node("127.0.0.1") as joined:
        for deb in archive.packages.values():
            for number in range(200):
                Stranger(joined, f"127.1.1.{number}").announce(sha256_of(deb), 20_001)
        cache = make_cache(upstream).start(dht=(joined,))
        web.faults.only, web.faults.rate = r"\.deb", 1_000_000
        began = time.monotonic()
        for deb in archive.packages.values():
            assert cache.get(url_of(web, deb)).body == deb.read_bytes()
        assert time.monotonic() - began < 30
        known = cache.status()["peers"]
        assert 0 < len(known) <= MAX_FOUND
        # What fails makes room for who is announced next.
        archive.add("other")
        archive.publish()
        Stranger(joined).announce(sha256_of(archive.packages["other"]), int(honest.address.rpartition(":")[2]))
        time.sleep(2.1)
        for name in ("InRelease", "main/binary-amd64/Packages.xz"):
            assert cache.get(f"{web.url}/dists/stable/{name}").status == 200
        web.faults.only, web.faults.status = r"other.*\.deb", 503
        assert cache.get(url_of(web, archive.packages["other"])).status == 200
        assert honest.sent("sha256") == archive.packages["other"].stat().st_size
        assert cache.status()["max_rss"] < 120e6


def test_a_liar(make_cache, upstream, archive, web, liars):  # noqa: F811
    liar = liars()
    liar.faults.change = lambda data: bytes(len(data))
    deb = archive.packages["large"]
    web.faults.only, web.faults.rate = r"\.deb", 2_000_000
    with node("127.0.0.1") as joined:
        Stranger(joined).announce(sha256_of(deb), int(liar.address.rpartition(":")[2]))
        cache = make_cache(upstream).start(dht=(joined,))
        answer = cache.get(url_of(web, deb))
    assert answer.whole
    assert answer.body == deb.read_bytes()
    assert liar.sent("sha256") > 0
    assert f"peer {liar.address} is dropped" in cache.log()


def found_within(finder: Finder, sha256: str, seconds: float) -> set[tuple[str, int]]:
    async def find() -> set[tuple[str, int]]:
        running = asyncio.create_task(finder.run())
        end = time.monotonic() + seconds
        found: set[tuple[str, int]] = set()
        while not found and time.monotonic() < end:
            found = await finder.find(sha256)
        running.cancel()
        return found

    return asyncio.run(find())


def test_announcements_are_renewed_and_end_with_the_file(monkeypatch):
    monkeypatch.setattr(dht, "ANNOUNCE_S", 0.5)
    held = {"aa" * 32, "bb" * 32}
    with node("127.0.0.1") as joined:
        nodes = [("127.0.0.1", int(joined.partition(":")[2]))]
        here = Finder("127.0.0.1", nodes, Cluster(), 45001, held.__contains__)
        announced: list[str] = []
        real = here.session.dht_announce

        class Counting:
            def __getattr__(self, name: str) -> object:
                return getattr(session, name)

            def dht_announce(self, key: object, port: int, flags: int) -> None:
                announced.append(str(key))
                real(key, port, flags)

        session, here.session = here.session, Counting()

        async def announce() -> None:
            for sha256 in held:
                here.announce(sha256)
            running = asyncio.create_task(here.run())
            await asyncio.sleep(2)
            assert here.status()["announced"] == 2
            held.discard("bb" * 32)
            await asyncio.sleep(1.5)
            assert here.status()["announced"] == 1
            running.cancel()

        asyncio.run(announce())
        counts = {name: announced.count(Cluster().swarm_key(name * 32).hex()) for name in ("aa", "bb")}
        assert counts["aa"] > counts["bb"] >= 2
        there = Finder("", nodes, Cluster(), 0, lambda _: False)
        assert found_within(there, "aa" * 32, 20) == {("127.0.0.1", 45001)}
        # What was found is believed for a while, and then asked for again.
        there._found["aa" * 32] = (time.monotonic() - dht.AGAIN_S - 1, {("127.0.0.1", 9)})
        assert found_within(there, "aa" * 32, 20) == {("127.0.0.1", 45001)}
