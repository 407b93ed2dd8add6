"""What the cache is for, from beginning to end: two machines in network namespaces, a mirror behind 20 Mbit/s, real
packages, a peer that lies, and then no mirror any more. `pytest -s` shows the bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.archive import Archive, Keyring
from bench.mirror import ADDRESSES, lan
from hostos.mirror.upstreams import Apt
from mirror.cache import HERE, Cache, wait_until

PACKAGES = ("hello", "jq", "nano", "tree", "bc")
LIAR = f"{ADDRESSES['first']}:3199"
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root"),
    pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="needs mmdebstrap"),
]


@pytest.fixture
def real(tmp_path: Path, keyring: Keyring) -> Archive:
    """The packages as the distribution has them, with all they need, in an archive of the test's."""
    made = Archive(tmp_path / "real", keyring)
    pool = made.root / "pool"
    for part in ("partial",):
        (pool / part).mkdir(parents=True)
    (tmp_path / "status").touch()
    options = [f"Dir::Cache::Archives={pool}", f"Dir::State::Status={tmp_path}/status", "APT::Sandbox::User="]
    options += ["Debug::NoLocking=true", "APT::Install-Recommends=false"]
    command = ["apt-get", "-q", "-y", "--download-only", *(word for each in options for word in ("-o", each))]
    done = subprocess.run([*command, "install", *PACKAGES], capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"this machine's apt can't fetch {' '.join(PACKAGES)}: {done.stderr.strip()[-200:]}")
    shutil.rmtree(pool / "partial")
    for path in sorted(pool.glob("*.deb")):
        made.packages[path.name.partition("_")[0]] = path
    made.publish()
    return made


def sent(net, host: str) -> int:
    """Bytes that have left a host by its network card."""
    command = [*net.inside(host), "cat", "/proc/net/dev"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(next(line for line in shown.splitlines() if "eth0" in line).split()[9])


def install(net, host: str, cache: Cache, line: str, root: Path) -> float:
    """Install the packages into a new root by apt-get and dpkg; seconds."""
    began = time.monotonic()
    command = [
        *net.inside(host), "mmdebstrap", "--mode=root", "--variant=extract", "--quiet", "--skip=check/empty",
        f"--include={','.join(PACKAGES)}", f'--aptopt=Acquire::http::Proxy "{cache.proxy}"',
        "--aptopt=Acquire::Retries 3", "stable", str(root), line,
    ]  # fmt: skip
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr + cache.log()
    seconds = time.monotonic() - began
    ran = subprocess.run(["chroot", root, "/usr/bin/hello"], capture_output=True, text=True, check=True)
    assert ran.stdout == "Hello, world!\n"
    return seconds


def test_the_whole(real, trusted, make_cache, tmp_path):
    total = sum(path.stat().st_size for path in real.packages.values())
    with lan() as net, ExitStack() as stack:
        net.serve(stack, real.root)
        liar = stack.enter_context(
            subprocess.Popen(
                [*net.inside("first"), sys.executable, str(HERE / "server.py"), LIAR, str(real.root), "--lie"],
                stdout=subprocess.PIPE,
                stdin=subprocess.PIPE,
            )
        )
        stack.callback(liar.kill)
        assert liar.stdout
        assert liar.stdout.readline() == b"ready\n"
        url = f"http://{ADDRESSES['mirror']}:8000"
        line = f"deb [signed-by={trusted}] {url} stable main"
        entry = Apt(url, ("stable",), ("main",), ("amd64",), str(trusted))
        share = f"{ADDRESSES['first']}:3144"
        first = make_cache(entry, inside=net.inside("first")).start(share=share)
        second = make_cache(entry, inside=net.inside("second")).start(peers=(share, LIAR))
        print(f"\n{len(real.packages)} packages of the distribution, {total:,} bytes; the mirror sends 20 Mbit/s")

        def account(what: str, host: str, cache: Cache, root: str) -> int:
            before, counted = sent(net, "mirror"), cache.stats()["archives"].get(f"{ADDRESSES['mirror']}:8000", {})
            seconds = install(net, host, cache, line, tmp_path / root)
            left = sent(net, "mirror") - before
            now = cache.stats()["archives"][f"{ADDRESSES['mirror']}:8000"]
            figures = {name: now[name] - counted.get(name, 0) for name in ("served", "from_mirror", "from_peers")}
            shown = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in figures.items())
            print(f"{what}: {seconds:.1f} s; {shown}; the mirror's card sent {left:,}")
            return left

        assert account("first machine, nothing cached", "first", first, "one") > total
        assert account("second machine, peers: the first and a liar", "second", second, "two") < 0.05 * total
        known = {peer["address"]: peer["liar"] for peer in second.status()["peers"]}
        print(next(text for text in second.log().splitlines() if "is dropped" in text))
        assert known == {share: False, LIAR: True}

        subprocess.run(["ip", "-n", f"{net.prefix}mirror", "link", "set", "eth0", "down"], check=True)
        second.hostos("prune", "--all")
        assert second.held() == []
        assert account("the mirror cut off, second machine emptied", "second", second, "three") == 0
        wait_until(lambda: second.status()["arriving"] == 0)
        wanted = {path.name: path.read_bytes() for path in real.packages.values()}
        kept = {path.read_bytes() for path in second.held()}
        assert set(wanted.values()) <= kept
