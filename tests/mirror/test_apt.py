"""apt-get through the cache: everything arrives, is verified, kept, and fetched once."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hostos import background
from hostos.mirror import control
from hostos.mirror.upstreams import Apt
from mirror.cache import wait_until


def url_of(web, deb):
    return f"{web.url}/{deb.relative_to(web.root)}"


def test_packages_arrive_and_are_fetched_once(cache, web, archive, make_client):
    first = make_client(cache)
    first.update()
    first.download("small", "middle", "large")
    assert first.debs() == {path.name: path.read_bytes() for path in archive.packages.values()}
    sent = web.sent(r"\.deb")
    assert sent == sum(path.stat().st_size for path in archive.packages.values())
    second = make_client(cache)
    second.update()
    second.download("small", "middle", "large")
    assert second.debs() == first.debs()
    assert web.sent(r"\.deb") == sent
    figures = cache.stats()["archives"][web.address]
    assert figures["from_mirror"] >= sent
    assert figures["hits"] >= 3
    assert figures["served"] >= 2 * sent
    assert cache.partials() == []
    for path in cache.held():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_a_client_whose_lists_are_older_than_the_cache(cache, web, archive, make_client):
    direct = make_client(cache, proxy="false")
    direct.update()
    direct.proxy = cache.proxy
    direct.download("small", "large")
    assert len(direct.debs()) == 2


def test_without_a_proxy_setting_the_host_stands_in_the_path(cache, web, archive):
    deb = archive.packages["small"]
    path = f"/{web.address}/{deb.relative_to(web.root)}"
    assert cache.get(path).body == deb.read_bytes()


def test_bytes_arrive_while_they_are_fetched_but_never_the_last_ones_of_a_bad_file(cache, web, archive):
    deb = archive.packages["large"]
    size = deb.stat().st_size
    web.faults.only = r"large.*\.deb"
    web.faults.pause_at = 2_000_000
    host, _, port = cache.address.rpartition(":")
    client = http.client.HTTPConnection(host, int(port), timeout=60)
    client.request("GET", url_of(web, deb))
    response = client.getresponse()
    begun = response.read(1_000_000)
    assert begun == deb.read_bytes()[:1_000_000]
    assert not web.faults.go.is_set()
    web.faults.go.set()
    assert begun + response.read() == deb.read_bytes()
    client.close()
    cache.hostos("prune", "--all")

    web.faults.pause_at = -1
    web.faults.change = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    bad = cache.get(url_of(web, deb))
    assert not bad.whole
    assert len(bad.body) <= size - (64 << 10)
    wait_until(lambda: cache.partials() == [])
    assert not any(path.stat().st_size == size for path in cache.held())
    # What apt does with that: it tries again, and the archive has been mended.
    web.faults.change = None
    assert cache.get(url_of(web, deb)).body == deb.read_bytes()


def test_ranges_conditions_and_heads(cache, web, archive):
    deb = archive.packages["middle"]
    data, url = deb.read_bytes(), url_of(web, deb)
    head = cache.get(url, "HEAD")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(data)))
    assert web.asked(r"\.deb") == []
    miss = cache.get(url, Range="bytes=100-199")
    assert (miss.status, miss.body) == (206, data[100:200])
    whole = cache.get(url)
    assert whole.headers["ETag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    for text, expected in (
        ("bytes=0-0", data[:1]),
        ("bytes=-5", data[-5:]),
        (f"bytes={len(data) - 3}-", data[-3:]),
        ("bytes=10-99999999999", data[10:]),
        ("bytes=-99999999999", data),
    ):
        part = cache.get(url, Range=text)
        assert (part.status, part.body) == (206, expected), text
    absurd = (f"bytes={len(data)}-", "bytes=99999999999999999999-", "bytes=-0")
    for text in absurd[:1] + absurd[2:]:
        assert cache.get(url, Range=text).status == 416
    for text in ("bytes=5-2", "lines=1-2", "bytes=0-1,3-4", absurd[1], "bytes=" + "0-1," * 500):
        answer = cache.get(url, Range=text)
        assert (answer.status, answer.body) == (200, data), text
    assert cache.get(url, If_None_Match=whole.headers["ETag"]).status == 304
    assert cache.get(url, If_Modified_Since=cache.get(url).headers["Last-Modified"]).status == 304
    assert cache.get(url, Range="bytes=0-0", If_Range='"another"').status == 200
    assert cache.get(url, Range="bytes=0-0", If_Range=whole.headers["ETag"]).status == 206
    release = cache.get(f"{web.url}/dists/stable/InRelease")
    again = cache.get(f"{web.url}/dists/stable/InRelease", If_Modified_Since=release.headers["Last-Modified"])
    assert (release.status, again.status) == (200, 304)


def test_one_connection_serves_many_requests(cache, web, archive):
    host, _, port = cache.address.rpartition(":")
    client = http.client.HTTPConnection(host, int(port), timeout=60)
    client.connect()
    socket = client.sock
    for deb in archive.packages.values():
        client.request("GET", url_of(web, deb))
        assert client.getresponse().read() == deb.read_bytes()
        assert client.sock is socket
    client.close()


def test_what_the_client_asks_for_next_is_begun(cache, web, archive, make_client):
    """apt sends ten requests at once; a mirror that is far away is not waited for once for each."""
    names = [f"many{number:02}" for number in range(16)]
    for name in names:
        archive.add(name, 20_000)
    archive.publish()
    client = make_client(cache)
    client.update()
    web.faults.only, web.faults.delay = r"many.*\.deb", 0.3
    client.download(*names)
    assert client.debs() == {archive.packages[name].name: archive.packages[name].read_bytes() for name in names}
    assert 2 <= web.most_waiting <= 5
    assert len(web.asked(r"many.*\.deb")) == len(names)
    figures = cache.stats()["archives"][web.address]
    # Fetched for it, if before its turn: not one was there already.
    assert figures["misses"] >= len(names)
    assert figures["hits"] == 0


def test_many_clients_at_once_and_one_fetch(cache, web, archive):
    deb = archive.packages["large"]
    web.faults.only, web.faults.pause_at = r"large.*\.deb", 1_000_000
    with ThreadPoolExecutor(20) as threads:
        asked = [threads.submit(cache.get, url_of(web, deb)) for _ in range(20)]
        wait_until(lambda: web.asked(r"large.*\.deb"))
        time.sleep(0.3)
        web.faults.go.set()
        assert all(each.result().body == deb.read_bytes() for each in asked)
    assert len(web.asked(r"large.*\.deb")) == 1


def test_two_hundred_requests_in_parallel(cache, web, archive):
    for number in range(40):
        archive.add(f"many{number:02}", 30_000)
    archive.publish()
    urls = [url_of(web, deb) for name, deb in archive.packages.items() if name.startswith("many")]
    with ThreadPoolExecutor(200) as threads:
        answers = list(threads.map(cache.get, urls * 5))
    assert {answer.status for answer in answers} == {200}
    assert all(answer.whole for answer in answers)
    assert cache.status()["max_rss"] <= 120e6


def test_a_large_package_takes_no_more_memory(cache, web, archive):
    archive.add("huge", 100_000_000)
    archive.publish()
    deb = archive.packages["huge"]
    before = cache.status()["max_rss"]
    answer = cache.get(url_of(web, deb))
    assert hashlib.sha256(answer.body).digest() == hashlib.sha256(deb.read_bytes()).digest()
    assert cache.status()["max_rss"] - before < 24e6


def test_killed_in_the_middle_it_goes_on_where_it_was(cache, web, archive):
    deb = archive.packages["large"]
    web.faults.only, web.faults.pause_at = r"large.*\.deb", 3_500_000
    with ThreadPoolExecutor(1) as threads:
        begun = threads.submit(cache.get, url_of(web, deb))
        wait_until(lambda: web.sent(r"large.*\.deb") >= 3_500_000)
        time.sleep(0.3)
        cache.kill()
        assert not begun.result().whole
    web.faults.go.set()
    assert [path.stat().st_size for path in cache.held() if path.stat().st_size > 4_000_000] == []
    cache.start()
    assert cache.get(url_of(web, deb)).body == deb.read_bytes()
    resumed = web.asked(r"large.*\.deb")[-1]
    assert resumed.range == f"bytes=3145728-{deb.stat().st_size - 1}"


def test_a_dead_worker_is_replaced(cache, web, archive):
    cache.stop()
    cache.start(listen=(cache.address,))
    os.kill(cache.info["pid"], signal.SIGKILL)
    wait_until(lambda: background.request(cache.place, "status") is not None)
    assert cache.status()["pid"] != cache.info["pid"]
    assert cache.get(url_of(web, archive.packages["small"])).status == 200


def test_what_is_spoiled_on_the_way_to_the_disk_is_fetched_again(cache, web, archive):
    deb = archive.packages["large"]
    web.faults.only, web.faults.cut_at = r"large.*\.deb", 4_000_000
    web.faults.status = 0
    with ThreadPoolExecutor(1) as threads:
        web.faults.pause_at = 3_500_000
        begun = threads.submit(cache.get, url_of(web, deb))
        wait_until(lambda: web.sent(r"large.*\.deb") >= 3_500_000)
        time.sleep(0.3)
        cache.kill()
        begun.result()
    web.faults.go.set()
    web.faults.pause_at = web.faults.cut_at = -1
    partial = next(path for path in cache.partials() if not path.name.endswith(".parts"))
    with partial.open("r+b") as file:
        file.write(b"spoiled")
    cache.start()
    answer = cache.get(url_of(web, deb))
    # What had been sent of the spoiled one can't be taken back; it does not complete, and is not kept.
    assert not answer.whole or answer.body == deb.read_bytes()
    assert cache.get(url_of(web, deb)).body == deb.read_bytes()


def test_indexes_of_every_kind(make_cache, web, archive, trusted, make_client):
    patch = b"patch\n"
    digest = hashlib.sha256(gzip.compress(patch, mtime=0))
    source = archive.root / "pool/main/s/small/small_1.0.tar.xz"
    source.write_bytes(b"source code")
    listing = f" {hashlib.sha256(b'source code').hexdigest()} 11 small_1.0.tar.xz"
    archive.more = {
        "main/source/Sources": f"Package: small\nDirectory: pool/main/s/small\nChecksums-Sha256:\n{listing}\n".encode(),
        "main/Contents-amd64.gz": gzip.compress(b"nothing"),
        "main/dep11/Components-amd64.yml.gz": gzip.compress(b"---"),
        "main/binary-amd64/Packages.diff/Index": (
            f"SHA256-Download:\n {digest.hexdigest()} {len(gzip.compress(patch, mtime=0))} T-1.gz\n"
        ).encode(),
    }
    archive.publish()
    (archive.release / "main/binary-amd64/Packages.diff/T-1.gz").write_bytes(gzip.compress(patch, mtime=0))
    cache = make_cache(Apt(web.url, ("stable",), ("main",), ("amd64",), str(trusted), sources=True)).start()
    for name in archive.more:
        assert cache.get(f"{web.url}/dists/stable/{name}").body == archive.more[name], name
    diff = f"{web.url}/dists/stable/main/binary-amd64/Packages.diff"
    wait_until(lambda: "Packages.diff/Index: 2 files" in cache.log())
    assert gzip.decompress(cache.get(f"{diff}/T-1.gz").body) == patch
    assert cache.get(f"{web.url}/{source.relative_to(web.root)}").body == b"source code"
    unlisted = archive.release / "main/binary-amd64/Packages.lz4"
    unlisted.write_bytes(b"whatever")
    answer = cache.get(f"{web.url}/dists/stable/main/binary-amd64/Packages.lz4")
    assert answer.status == 404
    assert "nothing signed names" in answer.reason


def test_a_flat_archive(make_cache, tmp_path, keyring, trusted, make_client):
    from bench.archive import Archive
    from mirror.server import Web

    flat = Archive(tmp_path / "flat", keyring, suite="./")
    flat.root.mkdir()
    flat.add("level")
    flat.publish(inline=False)
    web = Web(flat.root)
    try:
        cache = make_cache(Apt(web.url, ("./",), (), (), str(trusted))).start()
        client = make_client(cache, sources=[f"deb [signed-by={trusted}] {web.url} ./"])
        client.update()
        client.download("level")
        assert list(client.debs().values()) == [flat.packages["level"].read_bytes()]
    finally:
        web.close()


def test_offline_it_serves_what_it_has_and_says_what_it_lacks(cache, web, archive, make_client):
    client = make_client(cache)
    client.update()
    client.download("small")
    cache.stop()
    cache.start(offline=True)
    asked = len(web.log)
    later = make_client(cache)
    later.update()
    later.download("small")
    failed = later.download("large", check=False)
    assert failed.returncode != 0
    assert "is not in the cache, which is offline" in failed.stderr
    assert len(web.log) == asked
    assert cache.status()["offline"] is True


def test_prefetch_of_what_is_used_when_the_index_changes(make_cache, upstream, web, archive, make_client):
    cache = make_cache(upstream).start(prefetch=True)
    client = make_client(cache)
    client.update()
    client.download("small")
    new = archive.add("small", version="2.0")
    archive.add("middle", version="2.0")
    archive.publish()
    time.sleep(2.1)
    client.update()
    wait_until(lambda: "prefetched" in cache.log())
    asked = len(web.asked(r"\.deb"))
    assert cache.get(url_of(web, new)).body == new.read_bytes()
    assert len(web.asked(r"\.deb")) == asked
    assert web.asked(r"middle_2.0") == []


def test_size_limit_expiry_and_pruning(make_cache, upstream, web, archive):
    cache = make_cache(upstream).start(size=6 << 20)
    urls = {name: url_of(web, deb) for name, deb in archive.packages.items()}
    for name in ("small", "large", "middle"):
        assert cache.get(urls[name]).status == 200
    archive.add("other", 4_000_000)
    archive.publish()
    time.sleep(2.1)
    for name in ("InRelease", "main/binary-amd64/Packages.xz"):
        assert cache.get(f"{web.url}/dists/stable/{name}").status == 200
    assert cache.get(url_of(web, archive.packages["other"])).status == 200
    assert cache.status()["size"] <= 6 << 20
    held = {path.stat().st_size for path in cache.held()}
    assert archive.packages["other"].stat().st_size in held
    assert archive.packages["large"].stat().st_size not in held
    assert cache.hostos("prune", "--keep-days", "1").stdout.startswith("removed 0 files")
    assert cache.hostos("prune", "--size", "1M").stdout.startswith("removed")
    assert cache.status()["size"] <= 1 << 20
    cache.hostos("prune", "--all")
    assert cache.held() == []
    assert cache.get(urls["small"]).status == 200


def test_verify_finds_damage(cache, web, archive):
    cache.get(url_of(web, archive.packages["middle"]))
    assert "0 damaged" in cache.hostos("verify").stderr
    size = archive.packages["middle"].stat().st_size
    victim = next(path for path in cache.held() if path.stat().st_size == size)
    with victim.open("r+b") as file:
        file.write(b"damage")
    done = cache.hostos("verify", check=False)
    assert done.returncode == 1
    assert victim.name in done.stderr
    assert not victim.exists()
    assert cache.get(url_of(web, archive.packages["middle"])).body == archive.packages["middle"].read_bytes()


def test_contribution(make_cache, upstream, web, archive):
    cache = make_cache(upstream).start(contribute=2)
    cache.get(f"{web.url}/dists/stable/main/binary-amd64/Packages.xz")
    wait_until(lambda: cache.log().count("contributed: ") == 2)
    assert len(web.asked(r"\.deb")) == 2


def test_status_says_when_it_does_not_run(make_cache, upstream):
    cache = make_cache(upstream)
    done = cache.hostos("status", check=False)
    assert (done.returncode, done.stderr) == (1, "the mirror is not running: hostos mirror start\n")
    assert cache.hostos("stop").stderr == "the mirror was not running\n"
    cache.configure()
    first = cache.hostos("start", "--listen", "127.0.0.1:0")
    assert 'Acquire::http::Proxy "http://127.0.0.1:' in first.stdout
    assert cache.hostos("start", "--listen", "127.0.0.1:0", "-q").returncode == 0
    shown = cache.hostos("status").stdout
    assert "shares   nothing with anybody" in shown
    assert "stable" in shown
    assert cache.hostos("stats").stdout.startswith("archive")
    other = cache.hostos("start", "--offline", check=False)
    assert other.returncode == 2
    assert "runs already, with other settings" in other.stderr


def test_an_address_that_is_taken(make_cache, upstream, web):
    done = make_cache(upstream)
    done.configure()
    failed = done.hostos("start", "--listen", web.address, check=False)
    assert failed.returncode == 2
    assert f"--listen {web.address}: Address already in use" in failed.stderr


@pytest.mark.parametrize("word", [("--peer", "x:y:z"), ("--size", "-1"), ("--listen", "nowhere"), ("--dht", "router")])
def test_bad_options(make_cache, upstream, word):
    cache = make_cache(upstream)
    cache.configure()
    done = cache.hostos("start", *word, check=False)
    assert done.returncode == 2
    assert not (cache.home / "state/mirror").exists()


def test_builds_find_a_running_cache(cache, web, monkeypatch):
    monkeypatch.setenv("HOSTOS_HOME", str(cache.home))
    assert control.proxy_for(web.url) == cache.proxy
    assert control.proxy_for("http://192.0.2.1/debian") is None
    assert control.proxy_for(web.url.replace("http:", "https:")) is None
    cache.stop()
    assert control.proxy_for(web.url) is None
