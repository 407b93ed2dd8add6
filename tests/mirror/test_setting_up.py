"""From a machine's own sources to its package manager's configuration, and back."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import time

import pytest

from bench.archive import Archive
from hostos.mirror import upstreams
from hostos.mirror.upstreams import Apt
from mirror.cache import wait_until
from mirror.server import Web
from mirror.test_apt import url_of

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts over /etc/apt: needs root")


def instead_of(place: str, directory) -> list[str]:
    """Words before a command, for which `directory` is what is at `place`."""
    return ["unshare", "--mount", "sh", "-c", f'mount --bind {directory} {place} && exec "$@"', "sh"]


@needs_root
def test_the_first_start_takes_over_the_machines_sources(make_cache, web, archive, trusted, tmp_path):
    apt = tmp_path / "apt"
    (apt / "sources.list.d").mkdir(parents=True)
    (apt / "sources.list").write_text(f"deb [signed-by={trusted}] {web.url} stable main\n")
    cache = make_cache(inside=instead_of("/etc/apt", apt))
    started = cache.hostos("start", "--listen", "127.0.0.1:0")
    line = started.stdout.strip()
    cache.info = cache.status()
    assert line == (
        f'Acquire::http::Proxy "{cache.proxy}"; Acquire::https::Proxy "DIRECT"; // by hostos mirror enable apt'
    )
    file = cache.home / "config/mirror.toml"
    entry = Apt(web.url, ("stable",), ("main",), (), str(trusted))
    assert upstreams.load(file).apt == (entry,)
    assert cache.get(url_of(web, archive.packages["small"])).status == 200
    # Another source, later; the running cache follows.
    (apt / "sources.list.d/more.sources").write_text(
        f"Types: deb deb-src\nURIs: http://more.invalid/debian\nSuites: x\nComponents: main\nSigned-By: {trusted}\n"
    )
    cache.hostos("import")
    assert [each.url for each in upstreams.load(file).apt] == [web.url, "http://more.invalid/debian"]
    wait_until(lambda: len(cache.status()["archives"]) == 2)
    (apt / "sources.list").unlink()
    cache.hostos("import", "--replace")
    assert [each.url for each in upstreams.load(file).apt] == ["http://more.invalid/debian"]
    # Nothing to take over changes nothing.
    shutil.rmtree(apt / "sources.list.d")
    before = file.read_bytes()
    failed = cache.hostos("import", "--replace", check=False)
    assert failed.returncode == 2
    assert "no package sources" in failed.stderr
    assert file.read_bytes() == before


def snapshot(root) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(root)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mode)
        for path in sorted(root.rglob("*"))
    }


def test_enable_and_disable_leave_no_trace(cache, tmp_path):
    root = tmp_path / "root"
    (root / "etc/apt/apt.conf.d").mkdir(parents=True)
    (root / "etc/apt/apt.conf.d/10mine").write_text("APT::Mine true;\n")
    (root / "etc/pacman.d").mkdir()
    (root / "etc/pacman.d/mirrorlist").write_text("## mine\nServer = https://m.example/$repo/os/$arch")
    (root / "etc/pacman.d/mirrorlist").chmod(0o640)
    before = snapshot(root)
    for client in ("apt", "pacman"):
        done = cache.hostos("enable", client, "--root", str(root))
        assert cache.proxy in done.stderr
    config = root / "etc/apt/apt.conf.d"
    only = tmp_path / "apt.conf"
    only.write_text(f'Dir::Etc::parts "{config}"; Dir::Etc::main "/dev/null";\n')
    env = {**os.environ, "APT_CONFIG": str(only)}
    shown = subprocess.run(["apt-config", "dump"], env=env, capture_output=True, text=True, check=True).stdout
    # apt itself reads it so.
    assert f'Acquire::http::Proxy "{cache.proxy}";' in shown
    assert 'Acquire::https::Proxy "DIRECT";' in shown
    listing = (root / "etc/pacman.d/mirrorlist").read_text().splitlines()
    assert listing[0] == f"Server = {cache.proxy}/pacman/$repo/$arch"
    assert snapshot(root) != before
    for client in ("apt", "pacman"):
        assert "taken out" in cache.hostos("disable", client, "--root", str(root)).stderr
    assert snapshot(root) == before
    for client in ("apt", "pacman"):
        assert "was not there" in cache.hostos("disable", client, "--root", str(root)).stderr
    assert snapshot(root) == before
    bad = cache.hostos("enable", "apt", "--root", str(tmp_path / "nowhere"), check=False)
    assert bad.returncode == 2


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_both_loopback_addresses(make_cache, upstream, web, archive):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no ::1 here")
    cache = make_cache(upstream).start(listen=("127.0.0.1:0", "[::1]:0"))
    four, six = cache.info["listen"]
    assert six.startswith("[::1]:")
    url = url_of(web, archive.packages["middle"])
    for address in (four, six):
        cache.info["listen"] = [address]
        host, _, port = address.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=30) as client:
            client.sendall(f"GET {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while data := client.recv(1 << 16):
                answer += data
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(archive.packages["middle"].read_bytes())


def test_figures_of_each_archive(make_cache, upstream, web, archive, tmp_path, keyring, trusted):
    other = Archive(tmp_path / "other", keyring)
    other.root.mkdir()
    other.add("else", 50_000)
    other.publish()
    elsewhere = Web(other.root)
    try:
        cache = make_cache(upstream, Apt(elsewhere.url, ("stable",), ("main",), ("amd64",), str(trusted))).start()
        for _ in range(3):
            assert cache.get(url_of(web, archive.packages["small"])).status == 200
        assert cache.get(url_of(elsewhere, other.packages["else"])).status == 200
        assert cache.get(f"{elsewhere.url}/nothing").status == 404
        figures = cache.stats()["archives"]
    finally:
        elsewhere.close()
    one, two = figures[web.address], figures[elsewhere.address]
    size = {name: path.stat().st_size for name, path in {**archive.packages, **other.packages}.items()}
    assert (one["requests"], one["hits"], one["misses"], one["refused"]) == (3, 2, 1, 0)
    assert (two["requests"], two["hits"], two["misses"], two["refused"]) == (2, 0, 1, 1)
    assert (one["served"], two["served"]) == (3 * size["small"], size["else"])
    assert one["from_mirror"] >= size["small"]
    assert two["from_mirror"] >= size["else"]
    shown = cache.hostos("stats").stdout
    assert web.address in shown
    assert elsewhere.address in shown


def test_what_is_not_used_for_long_goes_by_itself(make_cache, upstream, web, archive):
    cache = make_cache(upstream).start(keep_days=10)
    for name in ("small", "middle"):
        assert cache.get(url_of(web, archive.packages[name])).status == 200
    cache.stop()
    with sqlite3.connect(cache.store / "ledger.db") as database:
        database.execute(
            "UPDATE content SET used = ? WHERE size = ?",
            (time.time() - 11 * 86400, archive.packages["middle"].stat().st_size),
        )
    database.close()
    cache.start()
    wait_until(lambda: "expired: 1 files" in cache.log())
    sizes = {path.stat().st_size for path in cache.held()}
    assert archive.packages["small"].stat().st_size in sizes
    assert archive.packages["middle"].stat().st_size not in sizes


def test_contributed_packages_are_offered_and_go_first(make_cache, upstream, web, archive):
    import hashlib

    from mirror.test_peers import peer_get

    cache = make_cache(upstream).start(contribute=2, share="127.0.0.1:0")
    cache.get(f"{web.url}/dists/stable/main/binary-amd64/Packages.xz")
    wait_until(lambda: cache.log().count("contributed: ") == 2)
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in archive.packages.items()}
    offered = [name for name, digest in digests.items() if peer_get(cache.info["share"], f"/sha256/{digest}")[0] == 200]
    assert len(offered) == 2
    asked = next(name for name in archive.packages if name not in offered)
    assert cache.get(url_of(web, archive.packages[asked])).status == 200
    # Room is made of what nobody here wanted.
    cache.hostos("prune", "--size", str(archive.packages[asked].stat().st_size + 10_000))
    held = {path.name for path in cache.held()}
    assert digests[asked] in held
    assert not {digests[name] for name in offered if archive.packages[name].stat().st_size > 10_000} & held
