"""Peers: what one has, others get from it; who lies is dropped, and nobody's client notices."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import time

import pytest

from hostos.mirror.cluster import Cluster
from hostos.mirror.dht import Finder
from mirror.cache import Cache, wait_until
from mirror.server import Web
from mirror.test_apt import url_of


@pytest.fixture
def liars(archive):
    """Starts peers that have every file of the archive, and may misbehave."""
    made: list[Web] = []

    def by_hash(sha256: str):
        for path in archive.packages.values():
            if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return path
        return None

    def start() -> Web:
        made.append(Web(archive.root, by_hash=by_hash))
        made[-1].faults.only = "sha256"
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture
def first(make_cache, upstream, archive, web) -> Cache:
    """A cache that shares, and has all of the archive's packages."""
    cache = make_cache(upstream).start(share="127.0.0.1:0")
    for deb in archive.packages.values():
        assert cache.get(url_of(web, deb)).status == 200
    return cache


def peer_get(address: str, path: str, method: str = "GET", **headers: str):
    host, _, port = address.rpartition(":")
    client = http.client.HTTPConnection(host, int(port), timeout=30)
    client.request(method, path, headers=headers)
    response = client.getresponse()
    body = response.read()
    client.close()
    return response.status, body


def test_the_second_gets_it_from_the_first(first, make_cache, make_client, upstream, archive, web):
    second = make_cache(upstream).start(peers=(first.info["share"],))
    before = web.sent()
    client = make_client(second)
    client.update()
    client.download("small", "middle", "large")
    assert client.debs() == {path.name: path.read_bytes() for path in archive.packages.values()}
    total = sum(path.stat().st_size for path in archive.packages.values())
    assert web.sent(r"\.deb") == total
    assert web.sent() - before < 0.05 * total
    figures = second.stats()["archives"][web.address]
    assert figures["from_peers"] > 0.95 * (figures["from_peers"] + figures["from_mirror"])
    assert first.stats()["peers"][0]["sent"] >= total


def test_the_mirror_cut_off(first, make_cache, make_client, upstream, archive, web):
    second = make_cache(upstream).start(peers=(first.info["share"],))
    client = make_client(second)
    client.update()
    web.faults.only, web.faults.down = ".*", True
    client.download("large")
    assert len(client.debs()) == 1


def test_peers_get_verified_files_and_nothing_else(first, archive):
    deb = archive.packages["middle"].read_bytes()
    path = f"/sha256/{hashlib.sha256(deb).hexdigest()}"
    address = first.info["share"]
    assert peer_get(address, path) == (200, deb)
    assert peer_get(address, path, Range="bytes=5-9") == (206, deb[5:10])
    assert peer_get(address, path, Range=f"bytes={len(deb)}-")[0] == 416
    assert peer_get(address, f"/sha256/{'0' * 64}")[0] == 404
    for other in ("/", "/sha256/", f"{path}/x", "/sha256/../ledger.db", "/dists/stable/InRelease", path.upper()):
        assert peer_get(address, other)[0] == 404, other
    assert peer_get(address, path, "POST")[0] == 405


WRONG = {
    "wrong bytes": {"change": lambda data: bytes(len(data))},
    "one wrong bit": {"change": lambda data: data[:-1] + bytes([data[-1] ^ 1])},
    "truncated": {"change": lambda data: data[: len(data) // 2]},
    "another size": {"claim": 123},
    "endless": {"change": lambda data: bytes(len(data)), "endless": True},
    "an error page": {"status": 500},
    "nothing": {"down": True},
    "no ranges": {"ignore_range": True, "change": lambda data: data[::-1]},
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_peer_that_lies(fault, liars, make_cache, make_client, upstream, archive, web):
    liar = liars()
    for name, value in WRONG[fault].items():
        setattr(liar.faults, name, value)
    cache = make_cache(upstream).start(peers=(liar.address,))
    client = make_client(cache, more=("Acquire::Retries=0",))
    client.update()
    client.download("small", "middle", "large")
    assert client.debs() == {path.name: path.read_bytes() for path in archive.packages.values()}
    dropped = {peer["address"]: peer["liar"] for peer in cache.status()["peers"]}[liar.address]
    if fault in ("wrong bytes", "one wrong bit", "endless", "no ranges"):
        assert dropped
        assert f"peer {liar.address} is dropped" in cache.log()
    if fault == "wrong bytes":
        # Nor is it asked after the next start.
        asked = len(liar.log)
        cache.hostos("prune", "--all")
        cache.stop()
        cache.start()
        assert cache.get(url_of(web, archive.packages["large"])).status == 200
        assert len(liar.log) == asked


def test_only_the_one_that_lied_is_dropped(first, liars, make_cache, upstream, archive, web):
    """Both have part in the file; comparing with the good one tells whose part was bad."""
    archive.add("vast", 30_000_000)
    archive.publish()
    deb = archive.packages["vast"]
    time.sleep(2.1)
    for name in ("dists/stable/InRelease", "dists/stable/main/binary-amd64/Packages.xz", deb.relative_to(web.root)):
        assert first.get(f"{web.url}/{name}").status == 200
    liar = liars()
    liar.faults.change = lambda data: bytes(len(data))
    cache = make_cache(upstream).start(peers=(first.info["share"], liar.address))
    assert cache.get(url_of(web, deb)).body == deb.read_bytes()
    if liar.sent("sha256"):
        assert {peer["address"]: peer["liar"] for peer in cache.status()["peers"]} == {
            first.info["share"]: False,
            liar.address: True,
        }


def test_a_large_file_of_a_liar_is_cut_and_apt_gets_it_again(liars, make_cache, make_client, upstream, archive, web):
    archive.add("vast", 40_000_000)
    archive.publish()
    liar = liars()
    liar.faults.change = lambda data: data[:20_000_000] + bytes(len(data) - 20_000_000)
    cache = make_cache(upstream).start(peers=(liar.address,))
    client = make_client(cache)
    client.update()
    client.download("vast")
    assert client.debs()["vast_1.0_amd64.deb"] == archive.packages["vast"].read_bytes()
    assert "is dropped" in cache.log()


@pytest.mark.parametrize(("name", "value"), [("pause_at", 1_500_000), ("rate", 2_000)])
def test_a_peer_that_crawls(name, value, liars, make_cache, upstream, archive, web):
    slow = liars()
    setattr(slow.faults, name, value)
    cache = make_cache(upstream).start(peers=(slow.address,))
    began = time.monotonic()
    assert cache.get(url_of(web, archive.packages["large"])).body == archive.packages["large"].read_bytes()
    assert time.monotonic() - began < 60
    assert web.sent(r"large.*\.deb") > 3_000_000


def test_a_dead_peer_is_asked_less_and_less(make_cache, upstream, archive, web):
    cache = make_cache(upstream).start(peers=("127.0.0.1:9",))
    for deb in archive.packages.values():
        assert cache.get(url_of(web, deb)).status == 200
    peer = cache.status()["peers"][0]
    assert "Connect" in peer["reason"]
    assert not peer["liar"]


def test_a_private_cluster(make_cache, make_client, upstream, archive, web, tmp_path):
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123456789abcdef\n")
    other = tmp_path / "other"
    other.write_text("fedcba9876543210fedcba9876543210\n")
    first = make_cache(upstream).start(share="127.0.0.1:0", cluster_key=str(key))
    assert first.get(url_of(web, archive.packages["large"])).status == 200
    sha256 = hashlib.sha256(archive.packages["large"].read_bytes()).hexdigest()
    assert peer_get(first.info["share"], f"/sha256/{sha256}")[0] == 403
    for file, shares in ((key, True), (other, False)):
        before = web.sent(r"\.deb")
        cache = make_cache(upstream).start(peers=(first.info["share"],), cluster_key=str(file))
        assert cache.get(url_of(web, archive.packages["large"])).body == archive.packages["large"].read_bytes()
        assert (web.sent(r"\.deb") == before) == shares


def test_upload_limit(make_cache, upstream, archive, web):
    first = make_cache(upstream).start(share="127.0.0.1:0", upload_limit=100_000)
    deb = archive.packages["middle"]
    assert first.get(url_of(web, deb)).status == 200
    began = time.monotonic()
    assert peer_get(first.info["share"], f"/sha256/{hashlib.sha256(deb.read_bytes()).hexdigest()}")[0] == 200
    assert time.monotonic() - began > 2


def test_download_limit(make_cache, upstream, archive, web):
    cache = make_cache(upstream).start(download_limit=100_000)
    began = time.monotonic()
    assert cache.get(url_of(web, archive.packages["middle"])).status == 200
    assert time.monotonic() - began > 2


def test_too_many_requests_of_one_peer(first, archive):
    deb = archive.packages["large"]
    path = f"/sha256/{hashlib.sha256(deb.read_bytes()).hexdigest()}"
    host, _, port = first.info["share"].rpartition(":")
    waiting = []
    try:
        for _ in range(40):
            client = http.client.HTTPConnection(host, int(port), timeout=30)
            client.request("GET", path)
            waiting.append(client)
        statuses = [client.getresponse().status for client in waiting]
    finally:
        for client in waiting:
            client.close()
    assert set(statuses) <= {200, 503}
    assert 200 in statuses
    wait_until(lambda: peer_get(first.info["share"], path)[0] == 200)


def test_peers_found_in_a_dht_of_their_own():
    """A node of the test's; nothing else is contacted."""
    import libtorrent

    node = libtorrent.session(
        {
            "listen_interfaces": "127.0.0.1:0", "enable_dht": True, "enable_lsd": False, "enable_upnp": False,
            "enable_natpmp": False, "dht_bootstrap_nodes": "", "dht_restrict_routing_ips": False,
            "dht_restrict_search_ips": False,
        }
    )  # fmt: skip
    wait_until(lambda: node.is_dht_running() and node.listen_port())
    nodes = [("127.0.0.1", node.listen_port())]

    async def find() -> set[tuple[str, int]]:
        first = Finder("127.0.0.1", nodes, Cluster(), 45001, lambda _: True)
        second = Finder("", nodes, Cluster(), 0, lambda _: True)
        running = [asyncio.create_task(each.run()) for each in (first, second)]
        first.announce("ab" * 32)
        found: set[tuple[str, int]] = set()
        for _ in range(10):
            await asyncio.sleep(1)
            found = await second.find("ab" * 32)
            if found:
                break
        for task in running:
            task.cancel()
        return found

    assert asyncio.run(find()) == {("127.0.0.1", 45001)}
