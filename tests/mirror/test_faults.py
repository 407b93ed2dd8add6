"""Mirrors that fail, disks that fill, and requests that no package manager makes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import threading
import time

import pytest

from mirror.cache import wait_until
from mirror.test_apt import url_of


def test_a_mirror_that_is_down(cache, web, archive, make_client):
    client = make_client(cache)
    client.update()
    client.download("small")
    web.faults.only, web.faults.down = ".*", True
    time.sleep(2.1)
    # What was verified goes on being served, and what isn't there is said to be so.
    later = make_client(cache)
    later.update()
    later.download("small")
    answer = cache.get(url_of(web, archive.packages["large"]))
    assert answer.status == 504
    assert "the mirror" in answer.reason
    assert "what was verified before is served" in cache.log()


@pytest.mark.parametrize("status", [404, 403, 500, 503])
def test_a_mirror_that_refuses(cache, web, archive, status):
    web.faults.only, web.faults.status = r"\.deb", status
    answer = cache.get(url_of(web, archive.packages["small"]))
    assert answer.status == (404 if status == 404 else 504)
    assert f"the mirror {'says ' if status == 404 else ''}{status}" in answer.reason
    web.faults.status = 0
    assert cache.get(url_of(web, archive.packages["small"])).status == 200


def test_a_mirror_that_breaks_off(cache, web, archive):
    deb = archive.packages["large"]
    web.faults.only, web.faults.cut_at = r"large.*\.deb", 2_500_000
    answer = cache.get(url_of(web, deb))
    assert answer.whole
    assert answer.body == deb.read_bytes()
    assert [each.range for each in web.asked(r"large.*\.deb")][1].startswith("bytes=2")


def test_a_slow_mirror(cache, web, archive):
    deb = archive.packages["middle"]
    web.faults.only, web.faults.rate = r"middle.*\.deb", 100_000
    began = time.monotonic()
    assert cache.get(url_of(web, deb)).body == deb.read_bytes()
    assert time.monotonic() - began > 2


def test_a_mirror_that_knows_no_ranges(cache, web, archive):
    deb = archive.packages["large"]
    web.faults.only, web.faults.cut_at, web.faults.ignore_range = r"large.*\.deb", 2_500_000, True
    assert cache.get(url_of(web, deb)).body == deb.read_bytes()


def spoil(web, number, how):
    """Have `how` change the mirror's answer of that number for the large package; a list with its answers' sizes."""
    answers = []

    def change(data: bytes) -> bytes:
        answers.append(len(data))
        return how(data) if len(answers) == number else data

    web.faults.only, web.faults.change = r"large.*\.deb", change
    return answers


def test_a_file_that_changes_while_it_is_fetched(cache, web, archive):
    deb = archive.packages["large"]
    good = deb.read_bytes()
    spoil(web, 1, lambda data: data[:1_000_000] + bytes(len(data) - 1_000_000))
    first = cache.get(url_of(web, deb))
    assert not first.whole
    # apt asks again; by then the right one is there.
    assert cache.get(url_of(web, deb)).body == good


def test_a_file_that_is_replaced_while_it_is_resumed(cache, web, archive):
    """The beginning of one and the end of another are no package; what is signed comes from the beginning."""
    deb = archive.packages["large"]
    good = deb.read_bytes()
    answers = spoil(web, 2, lambda data: bytes(len(data)))
    web.faults.cut_at = 2_500_000
    first = cache.get(url_of(web, deb))
    assert not first.whole or first.body == good
    assert len(answers) >= 3
    assert cache.get(url_of(web, deb)).body == good
    assert {path.read_bytes() for path in cache.held() if path.stat().st_size == len(good)} == {good}


def test_an_index_that_changes_between_the_release_and_it(cache, web, archive):
    """The client goes by the Release it has; the mirror has moved on, and keeps the old one by its hash."""
    index = f"{web.url}/dists/stable/main/binary-amd64/Packages.xz"
    old = (web.root / "dists/stable/main/binary-amd64/Packages.xz").read_bytes()
    assert cache.get(f"{web.url}/dists/stable/InRelease").status == 200
    archive.add("new")
    archive.publish()
    answer = cache.get(index)
    assert (answer.status, answer.body) == (200, old)
    time.sleep(2.1)
    assert cache.get(f"{web.url}/dists/stable/InRelease").status == 200
    assert cache.get(index).body == (web.root / "dists/stable/main/binary-amd64/Packages.xz").read_bytes()
    assert cache.get(url_of(web, archive.packages["new"])).status == 200


def test_a_mirror_whose_file_has_another_size(cache, web, archive):
    deb = archive.packages["middle"]
    web.faults.only, web.faults.change = r"middle.*\.deb", lambda data: data + b"more"
    answer = cache.get(url_of(web, deb))
    assert answer.status == 502
    assert f"bytes, not {deb.stat().st_size}" in answer.reason


def test_an_endless_answer(cache, web, archive):
    deb = archive.packages["middle"]
    web.faults.only, web.faults.endless = r"middle.*\.deb", True
    assert cache.get(url_of(web, deb)).body == deb.read_bytes()


def fill(path):
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
def test_a_full_disk(make_cache, upstream, web, archive, make_client):
    cache = make_cache(upstream)
    cache.store.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", cache.store], check=True)
    try:
        cache.start()
        assert cache.get(url_of(web, archive.packages["large"])).status == 200
        archive.add("other", 4_500_000)
        archive.add("vast", 20_000_000)
        archive.publish()
        time.sleep(2.1)
        client = make_client(cache)
        client.update()
        # What was used longest ago makes room.
        client.download("other")
        failed = client.download("vast", check=False)
        assert failed.returncode != 0
        assert "disk is full" in failed.stdout + failed.stderr
        assert cache.get(url_of(web, archive.packages["small"])).status == 200
        # Filled by others while something arrives: an error, and nothing half kept.
        cache.hostos("prune", "--all")
        web.faults.only, web.faults.pause_at = r"large.*\.deb", 500_000
        answers = []
        asking = threading.Thread(target=lambda: answers.append(cache.get(url_of(web, archive.packages["large"]))))
        asking.start()
        wait_until(lambda: web.sent(r"large.*\.deb") > 5_000_000)
        time.sleep(0.5)
        fill(cache.store / "filler")
        web.faults.go.set()
        asking.join()
        assert answers[0].status == 507 or not answers[0].whole
        (cache.store / "filler").unlink()
        assert cache.get(url_of(web, archive.packages["large"])).status == 200
    finally:
        cache.stop()
        subprocess.run(["umount", "-l", cache.store], check=True)


def raw(cache, data: bytes, patience: float = 60.0) -> bytes:
    """What the cache answers to these very bytes."""
    host, _, port = cache.address.rpartition(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=patience) as client, contextlib.suppress(OSError):
        client.sendall(data)
        # Until it closes the connection, or waits for another request.
        while more := client.recv(1 << 16):
            answer += more
    return answer


def statuses(answer: bytes) -> list[int]:
    return [int(line.split()[1]) for line in answer.split(b"\r\n") if line.startswith((b"HTTP/1.0 ", b"HTTP/1.1 "))]


def test_requests_of_nobody(cache, web, archive):
    secret = web.root / "secret"
    secret.write_text("not in any index")
    host = web.address.encode()
    for target, status in (
        (b"/etc/passwd", 403),
        (b"/../../etc/passwd", 400),
        (b"http://%s/pool/..%%2f..%%2fsecret" % host, 400),
        (b"http://%s/%%00" % host, 400),
        (b"http://%s/a%%5cb" % host, 400),
        (b"http://%s/secret" % host, 404),
        (b"http://%s/secret?x=1" % host, 400),
        (b"http://192.0.2.1/debian/dists/stable/InRelease", 403),
        (b"http://127.0.0.1:22/", 403),
        (b"ftp://%s/secret" % host, 400),
        (b"*", 400),
        (b"http:///", 400),
        (b"/" + b"a" * 5000, 400),
    ):
        answer = raw(cache, b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % target)
        assert statuses(answer) == [status], (target, answer[:200])
        assert b"not in any index" not in answer
    for method, status in ((b"POST", 405), (b"PUT", 405), (b"CONNECT", 405)):
        target = b"%s:443" % host if method == b"CONNECT" else b"http://%s/" % host
        found = statuses(raw(cache, b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % (method, target)))
        assert found[:1] in ([status], [400]), (method, found)
    assert web.asked("secret") == []


def test_smuggled_requests(cache, web, archive):
    url = url_of(web, archive.packages["small"]).encode()
    inner = b"GET http://%s/dists/stable/InRelease HTTP/1.1\r\nHost: x\r\n\r\n" % web.address.encode()
    for headers in (
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n" % len(inner),
        b"Content-Length: 5\r\nContent-Length: %d\r\n" % len(inner),
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: %d\r\n" % len(inner),
        b"X: a\rb\r\n",
        b"X: a\nContent-Length: 3\r\n",
    ):
        answer = raw(cache, b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n%s" % (url, headers, inner), patience=2.0)
        assert len([each for each in statuses(answer) if each == 200]) <= 1, (headers, answer[:300])
        assert b"BEGIN PGP SIGNED MESSAGE" not in answer or statuses(answer)[0] == 400, headers
    assert web.asked("InRelease") == [] or len(web.asked("InRelease")) <= 2
    assert cache.get(url.decode()).status == 200


def test_enormous_headers(cache, web):
    answer = raw(cache, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n")
    assert statuses(answer) in ([400], [])
    assert cache.status()["in_flight"] == 0


def test_a_client_that_goes_away(cache, web, archive):
    deb = archive.packages["large"]
    web.faults.only, web.faults.pause_at = r"large.*\.deb", 2_000_000
    host, _, port = cache.address.rpartition(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % url_of(web, deb).encode())
        client.recv(1000)
    web.faults.go.set()
    wait_until(lambda: any(path.stat().st_size == deb.stat().st_size for path in cache.held()))
    wait_until(lambda: cache.status()["in_flight"] == 0)
    assert cache.get(url_of(web, deb)).body == deb.read_bytes()
