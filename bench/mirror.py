"""The package cache beside the mirror itself and apt-cacher-ng: real apt, real packages, a shaped mirror.

Three hosts in network namespaces on one switch: the mirror, which sends no more than 20 Mbit/s, and two
machines of a local network. apt fetches the same packages, by each way, into an empty cache of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from bench.archive import Archive, Keyring
from bench.harness import Comparison, Series, prepare, publish
from hostos.errors import UserError, failure
from hostos.mirror.upstreams import Apt, Upstreams, save
from hostos.steps import Steps

RATE_MBIT = 20
PACKAGES = 100
TOTAL = 40_000_000
"""Bytes of all packages; their sizes are spread as those of a distribution are: many small ones."""
PARALLEL = 200
NAMES = ("mirror", "first", "second")
# RFC 2544 sets these addresses aside for benchmarks.
ADDRESSES = dict(zip(NAMES, ("198.18.1.1", "198.18.1.2", "198.18.1.3"), strict=True))
PROGRAM = str(Path(sys.executable).parent / "hostos")
ROOT = Path(__file__).parents[1]
DEADLINE_S = 600.0
HITS = 5
"""A hit is a quarter of a second, most of it apt's own: it is measured so many times in each round."""


def run(rounds: int, steps: Steps, large: int = 0) -> Path:
    """Measure and publish. `large`: GiB of one more file, for the memory that it takes; 0: none.

    Raises `UserError` without root, apt or apt-cacher-ng, or when a side fails.
    """
    before = prepare()
    _check()
    direct, miss, peer = (
        Series("apt, directly from the mirror"),
        Series("hostos, a miss"),
        Series("hostos, from a peer"),
    )
    ours, theirs, theirs_miss = Series("hostos, a hit"), Series("apt-cacher-ng, a hit"), Series("apt-cacher-ng, a miss")
    shares, memory = [], []
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hm-", dir="/var/tmp")))
        net = stack.enter_context(lan())
        with steps.step(f"make {PACKAGES} packages"):
            archive, key = _archive(work, stack, large)
        url = f"http://{ADDRESSES['mirror']}:8000"
        net.serve(stack, archive.root)
        names = [name for name in archive.packages if name != "large"]
        for number in range(rounds):

            def fetch(where: str, proxy: str, number: int = number) -> float:
                return _fetch(net, where, work / f"apt-{number}-{random.random()}", url, key, proxy, names)

            with steps.step(f"round {number + 1}") as step, ExitStack() as caches:
                direct.samples.append(fetch("first", "false"))
                first = _cache(caches, net, "first", work / f"a{number}", url, key, share=f"{ADDRESSES['first']}:3144")
                miss.samples.append(fetch("first", first.proxy))
                ours.samples += [fetch("first", first.proxy) for _ in range(HITS)]
                second = _cache(caches, net, "second", work / f"b{number}", url, key, peer=f"{ADDRESSES['first']}:3144")
                peer.samples.append(fetch("second", second.proxy))
                figures = second.ask("stats")["archives"][f"{ADDRESSES['mirror']}:8000"]
                shares.append(figures["from_peers"] / (figures["from_peers"] + figures["from_mirror"]))
                _parallel(net, first.proxy, url, archive)
                memory.append(first.ask("status")["max_rss"] / 1e6)
                acng = _apt_cacher_ng(caches, net, "first", work / f"acng{number}")
                theirs_miss.samples.append(fetch("first", acng))
                theirs.samples += [fetch("first", acng) for _ in range(HITS)]
                step.detail = f"{100 * shares[-1]:.1f} % from the peer, {memory[-1]:.0f} MB"
        if large:
            memory.append(_large(stack, net, work, url, key, archive, steps))
    peer.notes["share of bytes from the peer, least"] = min(shares)
    ours.notes["most resident memory, MB"] = max(memory)
    ours.notes[f"failed of {PARALLEL} requests at once"] = 0
    print(f"least share from the peer: {100 * min(shares):.2f} %; most resident memory: {max(memory):.0f} MB")
    of_mirror = f"{PACKAGES} packages, {TOTAL / 1e6:.0f} MB, mirror at {RATE_MBIT} Mbit/s"
    return publish(
        "mirror",
        [
            Comparison(of_mirror, direct.name, [direct, miss, theirs_miss, peer], {miss.name: 1.03, peer.name: 1 / 3}),
            Comparison("the same, already in the cache", theirs.name, [theirs, ours], {ours.name: 1.05}),
        ],
        before,
    )


def _check() -> None:
    if os.geteuid() != 0:
        raise UserError(
            "the benchmark makes network namespaces, for which it must be root", "sudo -E .venv/bin/invoke bench.mirror"
        )
    for tool, package in (("apt-get", "apt"), ("apt-cacher-ng", "apt-cacher-ng"), ("tc", "iproute2"), ("gpg", "gpg")):
        if shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
            raise UserError(f"{tool} is not installed", f"apt-get install {package}")


def _archive(work: Path, stack: ExitStack, large: int) -> tuple[Archive, Path]:
    home = Path(tempfile.gettempdir()) / f"hm-bench-{os.getpid()}"
    keyring = Keyring(home)
    stack.callback(shutil.rmtree, home, ignore_errors=True)
    stack.callback(keyring.close)
    key = keyring.export(work / "key.gpg", "good")
    archive = Archive(work / "archive", keyring)
    archive.root.mkdir()
    chance = random.Random(1)
    weights = [chance.lognormvariate(0, 1.5) for _ in range(PACKAGES)]
    for number, weight in enumerate(weights):
        archive.add(f"bench{number:03}", max(2_000, int(TOTAL * weight / sum(weights))))
    if large:
        # Holes in a file cost the disk nothing, and the cache as much as any bytes.
        path = archive.add("large", 1000)
        os.truncate(path, large << 30)
    archive.publish()
    return archive, key


@dataclass(frozen=True)
class Lan:
    prefix: str

    def inside(self, name: str) -> list[str]:
        """What to put before a command so that it runs on that host."""
        return ["nsenter", f"--net=/run/netns/{self.prefix}{name}"]

    def serve(self, stack: ExitStack, root: Path) -> None:
        command = [*self.inside("mirror"), sys.executable, "-m", "bench.mirror", ADDRESSES["mirror"], str(root)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout
        stack.callback(process.stdout.close)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        if process.stdout.readline() != b"ready\n":
            raise failure("the mirror's web server did not start")


@contextmanager
def lan() -> Iterator[Lan]:
    """A switch, and the hosts on it."""
    made = Lan(f"hm{os.getpid()}-")
    with ExitStack() as stack:
        for name in ("switch", *NAMES):
            _ip("netns", "add", made.prefix + name)
            stack.callback(subprocess.run, ["ip", "netns", "del", made.prefix + name], check=False)
            _ip("-n", made.prefix + name, "link", "set", "lo", "up")
        switch = made.prefix + "switch"
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for name, address in ADDRESSES.items():
            host = made.prefix + name
            _ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", name, "netns", switch)
            _ip("-n", switch, "link", "set", name, "master", "bridge", "up")
            _ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")
        shape = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", f"{RATE_MBIT}mbit", "burst", "32k"]
        subprocess.run(["ip", "netns", "exec", made.prefix + "mirror", *shape, "latency", "50ms"], check=True)
        yield made


@dataclass(frozen=True)
class _Cache:
    proxy: str
    env: dict[str, str]

    def ask(self, what: str) -> dict[str, Any]:
        done = subprocess.run([PROGRAM, "mirror", what, "--json"], env=self.env, capture_output=True, check=True)
        return dict(json.loads(done.stdout))


def _cache(
    stack: ExitStack, lan: Lan, where: str, home: Path, url: str, key: Path, *, share: str = "", peer: str = ""
) -> _Cache:
    env = {**os.environ, "HOSTOS_HOME": str(home)}
    save(Upstreams((Apt(url, ("stable",), ("main",), ("amd64",), str(key)),)), home / "config/mirror.toml")
    options = [
        "--listen",
        "127.0.0.1:3143",
        *(["--share", share] if share else []),
        *(["--peer", peer] if peer else []),
    ]
    done = subprocess.run(
        [*lan.inside(where), PROGRAM, "mirror", "start", "-q", *options],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise failure(f"hostos mirror start: {done.stderr}")
    stack.callback(subprocess.run, [PROGRAM, "mirror", "stop"], env=env, stderr=subprocess.DEVNULL, check=False)
    return _Cache("http://127.0.0.1:3143", env)


def _apt_cacher_ng(stack: ExitStack, lan: Lan, where: str, directory: Path) -> str:
    for part in ("cache", "log"):
        (directory / part).mkdir(parents=True)
    settings = [f"CacheDir={directory}/cache", f"LogDir={directory}/log", "Port=3142", "BindAddress=127.0.0.1"]
    settings += ["AllowUserPorts=8000", f"SocketPath={directory}/socket", "ForeGround=1"]
    command = [*lan.inside(where), "/usr/sbin/apt-cacher-ng", "-c", "/etc/apt-cacher-ng", *settings]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.send_signal, signal.SIGTERM)
    until = time.monotonic() + 20
    probe = [*lan.inside(where), "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/3142"]
    while subprocess.run(probe, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        if time.monotonic() > until or process.poll() is not None:
            raise failure("apt-cacher-ng did not start")
        time.sleep(0.1)
    return "http://127.0.0.1:3142"


def _fetch(lan: Lan, where: str, root: Path, url: str, key: Path, proxy: str, names: Sequence[str]) -> float:
    """Seconds for `apt-get update` and fetching the packages, from nothing."""
    for part in ("state/lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
        (root / part).mkdir(parents=True)
    (root / "status").touch()
    (root / "apt.conf").write_text('Dir::Etc::parts "/dev/null";\n')
    (root / "etc/sources.list").write_text(f"deb [signed-by={key}] {url} stable main\n")
    options = [
        f"Dir={root}", f"Dir::State={root}/state", f"Dir::State::status={root}/status", f"Dir::Cache={root}/cache",
        f"Dir::Etc={root}/etc", "Dir::Log=/dev/null", "APT::Architecture=amd64", "APT::Architectures=amd64",
        "APT::Sandbox::User=", "Debug::NoLocking=true", "Acquire::Languages=none", f"Acquire::http::Proxy={proxy}",
        "APT::Update::Error-Mode=any",
    ]  # fmt: skip
    apt = [*lan.inside(where), "apt-get", "-q", "-y", *(word for each in options for word in ("-o", each))]
    env = {**os.environ, "APT_CONFIG": str(root / "apt.conf"), "LC_ALL": "C.UTF-8"}
    began = time.monotonic()
    for words in (["update"], ["--download-only", "install", *names]):
        done = subprocess.run([*apt, *words], env=env, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
        if done.returncode != 0:
            raise failure(f"apt-get {words[0]} through {proxy} failed: {done.stderr}")
    seconds = time.monotonic() - began
    shutil.rmtree(root)
    return seconds


def _parallel(lan: Lan, proxy: str, url: str, archive: Archive) -> None:
    """All at once; each answer is compared. Raises a failure if one is not right."""
    paths = [path for name, path in archive.packages.items() if name != "large"]
    wanted = {
        f"{url}/{path.relative_to(archive.root)}": hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }
    request = json.dumps({"proxy": proxy, "wanted": list(wanted.items()) * (PARALLEL // len(wanted))})
    command = [*lan.inside("first"), sys.executable, "-m", "bench.mirror", "--ask"]
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise failure(f"{PARALLEL} requests at once: {done.stdout}{done.stderr}")


def _large(stack: ExitStack, lan: Lan, work: Path, url: str, key: Path, archive: Archive, steps: Steps) -> float:
    """Most resident memory (MB) of a cache that fetched one large file."""
    subprocess.run(
        ["ip", "netns", "exec", f"{lan.prefix}mirror", "tc", "qdisc", "del", "dev", "eth0", "root"], check=True
    )
    with steps.step("a large file") as step:
        cache = _cache(stack, lan, "first", work / "large", url, key)
        path = archive.packages["large"]
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        request = json.dumps({"proxy": cache.proxy, "wanted": [(f"{url}/{path.relative_to(archive.root)}", digest)]})
        command = [*lan.inside("first"), sys.executable, "-m", "bench.mirror", "--ask"]
        subprocess.run(command, input=request, text=True, check=True, cwd=ROOT)
        memory = cache.ask("status")["max_rss"] / 1e6
        step.detail = f"{path.stat().st_size >> 30} GiB, {memory:.0f} MB"
    return float(memory)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


async def _ask(proxy: str, wanted: list[tuple[str, str]]) -> list[str]:
    """URLs that did not give what they should."""
    import aiohttp

    async def one(session: aiohttp.ClientSession, url: str, digest: str) -> str:
        got = hashlib.sha256()
        async with session.get(url, proxy=proxy) as answer:
            async for data in answer.content.iter_chunked(1 << 18):
                got.update(data)
        return "" if got.hexdigest() == digest else url

    timeout = aiohttp.ClientTimeout(DEADLINE_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        return [bad for bad in await asyncio.gather(*(one(session, *each) for each in wanted)) if bad]


def main() -> int:
    """The mirror's web server (`ADDRESS DIRECTORY`), or a client that asks for much at once (`--ask`)."""
    if sys.argv[1] == "--ask":
        request = json.load(sys.stdin)
        bad = asyncio.run(_ask(request["proxy"], request["wanted"]))
        print("\n".join(bad))
        return bool(bad)
    application = web.Application()
    application.router.add_static("/", sys.argv[2])
    web.run_app(application, host=sys.argv[1], port=8000, print=lambda *_: print("ready", flush=True), access_log=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
