"""Real images, real libtorrent seeds and the real daemon, on loopback addresses, as root."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hostos.image.store import Store
from hostos.live.client import Client, connect
from hostos.live.manifest import Layer, Manifest
from hostos.live.swarm_settings import SwarmSettings
from hostos.live.torrents import ImageBundle, Torrent, make_image_torrent, make_layer_torrent, verify_files

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TOOLS = ("cat", "chmod", "cp", "dd", "env", "id", "ls", "mkdir", "mount", "mv", "ps", "rm", "sh", "sleep", "stat")

# A PID 1 as small as can be; 37 is SIGRTMIN+3, by which systemd and nspawn ask for shutdown.
INIT = """#!/bin/sh
echo "init has come up as $(id -u)"
trap 'echo going down; exit 0' 37
while :; do sleep 0.1; done
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems: needs root")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.swarm)
            item.add_marker(needs_root)


def copy_tool(name: str, tree: Path) -> None:
    """A program of this machine with the libraries it needs."""
    source = shutil.which(name)
    assert source, f"the tests need {name}"
    libraries = subprocess.run(["ldd", source], capture_output=True, text=True, check=True).stdout
    wanted = [word for word in libraries.split() if word.startswith("/")]
    (tree / "usr/bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(source).resolve(), tree / "usr/bin" / name)
    for library in wanted:
        target = tree / "usr" / library.removeprefix("/usr").lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(Path(library).resolve(), target)


def make_tree(tree: Path) -> None:
    """A small root file system with one of everything a file system can hold."""
    for directory in ("dev", "etc", "home/user", "proc", "root", "run", "sbin", "sys", "tmp", "usr/lib64", "var"):
        (tree / directory).mkdir(parents=True, exist_ok=True)
    for name in TOOLS:
        copy_tool(name, tree)
    for link in ("bin", "lib", "lib64"):
        (tree / link).symlink_to(f"usr/{link}")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    (tree / "etc/os-release").write_text("ID=swarm\nNAME=Swarm\n")
    init = tree / "sbin/init"
    init.write_text(INIT)
    init.chmod(0o755)
    note = tree / "home/user/note"
    note.write_text("mine\n")
    (tree / "home/user/same").hardlink_to(note)
    (tree / "home/user/link").symlink_to("note")
    (tree / "home/user/hole").write_bytes(b"")
    os.truncate(tree / "home/user/hole", 3_000_000)
    os.setxattr(note, "user.colour", b"blue")
    for path in [tree / "home/user", *(tree / "home/user").iterdir()]:
        os.chown(path, 1000, 1000, follow_symlinks=False)
    (tree / "usr/bin/id").chmod(0o4755)
    (tree / "tmp").chmod(0o1777)
    os.mknod(tree / "var/null", 0o020666, os.makedev(1, 3))
    noise = random.Random(5)
    for number in range(24):
        (tree / f"var/data{number}").write_bytes(noise.randbytes(1_000_000))


@dataclass(frozen=True)
class Published:
    """An image on disk, as a seed needs it. `layer`: its squashfs file; `tree`: where it came from."""

    directory: Path
    tree: Path
    layer: Path
    layer_torrent: Torrent
    bundle: ImageBundle

    @property
    def image(self) -> str:
        return self.bundle.image


def publish(tree: Path, directory: Path, name: str) -> Published:
    directory.mkdir(parents=True)
    raw = directory / "layer.squashfs"
    subprocess.run(
        ["mksquashfs", tree, raw, "-noappend", "-quiet", "-no-progress", "-comp", "zstd", "-xattrs"], check=True
    )
    torrent = make_layer_torrent(raw)
    place = directory / torrent.info_hash
    place.mkdir()
    layer = place / torrent.name
    raw.rename(layer)
    (directory / f"{torrent.info_hash}.torrent").write_bytes(torrent.data)
    manifest = Manifest(name, os.uname().machine, (Layer(torrent.info_hash, torrent.size, torrent.name),))
    image, files = make_image_torrent(manifest, [torrent.data])
    for path, data in files.items():
        target = directory / image.info_hash / image.name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    (directory / f"{image.info_hash}.torrent").write_bytes(image.data)
    return Published(directory, tree, layer, torrent, verify_files(image.info_hash, files))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    base = tmp_path_factory.mktemp("image")
    make_tree(base / "tree")
    return publish(base / "tree", base / "published", "swarm-test")


@dataclass
class Helper:
    """A background process that says `ready` on its standard output."""

    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, *arguments: str, enter: Sequence[str] = ()) -> Helper:
        process = subprocess.Popen(
            [*enter, sys.executable, "-W", "ignore", *arguments],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout
        assert process.stdout.readline() == b"ready\n", f"{arguments} did not start"
        return cls(process)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(20)
        assert self.process.stdout
        self.process.stdout.close()


Start = Callable[..., Helper]


@pytest.fixture
def helpers() -> Iterator[list[Helper]]:
    running: list[Helper] = []
    yield running
    for helper in running:
        helper.stop(signal.SIGKILL)


@pytest.fixture
def seed(published: Published, helpers: list[Helper]) -> Start:
    """Starts a seed of the image at an address `HOST:PORT`."""

    def start(address: str, image: Published = published) -> Helper:
        helpers.append(Helper.start(str(HERE / "seed.py"), str(image.directory), address))
        return helpers[-1]

    return start


@pytest.fixture
def slow_seed(published: Published, helpers: list[Helper]) -> Start:
    """Starts a seed at an address `HOST:PORT` that sends 8 kB a second."""

    def start(address: str) -> Helper:
        helpers.append(Helper.start(str(HERE / "seed.py"), str(published.directory), address, "slow"))
        return helpers[-1]

    return start


@pytest.fixture
def liar(published: Published, helpers: list[Helper]) -> Start:
    """Starts a peer at an address `HOST:PORT` that has other bytes than it says."""

    def start(address: str) -> Helper:
        helpers.append(Helper.start(str(HERE / "seed.py"), str(published.directory), address, "lying"))
        return helpers[-1]

    return start


@pytest.fixture
def corruptor(helpers: list[Helper]) -> Start:
    """Starts a peer that passes everything on from a good one but spoils blocks: `address`, `good`."""

    def start(address: str, good: str, share: float = 1.0) -> Helper:
        helpers.append(Helper.start(str(HERE / "corruptor.py"), address, good, str(share)))
        return helpers[-1]

    return start


@dataclass
class Daemon:
    """The real daemon; `base` holds its socket, cache and mounts."""

    base: Path
    address: str
    extra: tuple[str, ...] = ()
    enter: tuple[str, ...] = ()
    """What to put before its command, e.g. to run it in another network namespace."""
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.base.mkdir(parents=True, exist_ok=True)
        with (self.base / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(*self.enter, sys.executable, "-W", "ignore", "-m", "hostos.live", "--no-systemd"),
                    *("--socket", str(self.base / "sock"), "--cache", str(self.base / "cache")),
                    *("--mounts", str(self.base / "mounts"), "--listen", self.address, *self.extra),
                ],
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        wait_until(lambda: (self.base / "sock").exists() or self.process.poll() is not None, 20)
        assert self.process.poll() is None, self.log()

    def client(self) -> Client:
        return connect(self.base / "sock", timeout=60)

    def log(self) -> str:
        return (self.base / "log").read_text()

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(30)

    def mounts(self) -> list[str]:
        """Mount points below its directory, from the kernel."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [point for line in lines if (point := line.split()[4]).startswith(f"{self.base}/")]

    def loops(self) -> int:
        """Loop devices over its files."""
        backing = Path("/sys/block").glob("loop*/loop/backing_file")
        return sum(file.read_text().startswith(f"{self.base}/") for file in backing)

    def fuse_file(self, image: Published) -> Path:
        return self.base / "mounts/fuse" / image.layer_torrent.info_hash


@pytest.fixture(scope="session")
def store(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the image, as a host has it."""
    made = Store(tmp_path_factory.mktemp("store"))
    with made.incoming() as temporary:
        layer = temporary / "layer"
        shutil.copy(published.layer, layer)
        added = made.add(published.bundle.manifest, [(published.layer_torrent, layer)])
    assert added == published.image
    return made


@dataclass(frozen=True)
class Lab:
    """Hosts in namespaces of their own on one network, 198.18.7.0/24 (RFC 2544)."""

    mark: str

    def enter(self, host: int) -> tuple[str, ...]:
        # Not `ip netns exec`: mounts must stay visible.
        return ("nsenter", f"--net=/run/netns/{self.mark}-{host}")

    @staticmethod
    def address(host: int) -> str:
        return f"198.18.7.{host}"

    def run(self, host: int, *command: str) -> None:
        subprocess.run([*self.enter(host), *command], check=True)


@contextmanager
def laboratory(mark: str) -> Iterator[Lab]:
    """Hosts 1 to 3, and their network in a namespace as well."""
    made = Lab(f"hst-{mark}-{os.getpid()}")
    names = [f"{made.mark}-{host}" for host in range(4)]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        made.run(0, "ip", "link", "add", "net", "type", "bridge")
        made.run(0, "ip", "link", "set", "net", "up")
        for host in (1, 2, 3):
            made.run(0, "ip", "link", "add", f"p{host}", "type", "veth", "peer", "name", "eth0", "netns", names[host])
            made.run(0, "ip", "link", "set", f"p{host}", "master", "net", "up")
            made.run(host, "ip", "address", "add", f"{made.address(host)}/24", "dev", "eth0")
            made.run(host, "ip", "link", "set", "eth0", "up")
            made.run(host, "ip", "route", "add", "default", "dev", "eth0")
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with laboratory("swarm") as made:
        yield made


PORT = 6881

RunSeed = Callable[[SwarmSettings], Path]


@pytest.fixture
def host_seed(lab: Lab, store: Store, tmp_path: Path) -> Iterator[RunSeed]:
    """Starts the real seed of `hostos seed start` on host 1; returns its log."""
    running: list[int] = []

    def start(settings: SwarmSettings) -> Path:
        log = tmp_path / "seed.log"
        command = [*lab.enter(1), sys.executable, "-W", "ignore", "-m", "hostos.image.seed"]
        command += ["--host", "0.0.0.0", "--port", str(PORT), "--swarm", json.dumps(settings.to_dict())]
        command += ["--store", str(store.root), "--state", str(tmp_path), "--socket", str(tmp_path / "s")]
        with log.open("wb") as sink:
            subprocess.run(command, stdout=sink, stderr=sink, timeout=60, check=True, cwd=ROOT)
        running.append(json.loads((tmp_path / "seed.json").read_text())["pid"])
        return log

    yield start
    for pid in running:
        subprocess.run(["kill", str(pid)], check=False)
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 20)


@contextmanager
def daemon_on(lab: Lab, host: int) -> Iterator[Daemon]:
    """A live-boot daemon on a host of the lab, with a cache of its own."""
    base = Path(f"/tmp/hostos-swarm-{host}-{random.getrandbits(32):08x}")
    running = Daemon(base, f"0.0.0.0:{PORT}", enter=lab.enter(host))
    try:
        yield running
    finally:
        running.stop()
        log = running.log()
        print(log)
        shutil.rmtree(base, ignore_errors=True)
    assert "Traceback" not in log


@pytest.fixture
def client_daemon(lab: Lab) -> Iterator[Daemon]:
    """A live-boot daemon on host 2."""
    with daemon_on(lab, 2) as running:
        yield running


@pytest.fixture
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A daemon of the test's own, listening for peers on an address no other test uses.

    Parametrised indirectly, it takes further arguments.
    """
    # Unix sockets have short names, and tmp_path may be long.
    base = Path(f"/tmp/hostos-swarm-{os.getpid()}-{random.getrandbits(32):08x}")
    running = Daemon(base, "127.0.0.3:0", getattr(request, "param", ()))
    try:
        yield running
    finally:
        running.stop()
        left = [point for point in running.mounts() if point != f"{base}/cache"]
        loops = running.loops()
        log = running.log()
        print(log)
        for point in reversed(running.mounts()):
            subprocess.run(["umount", "-l", point], check=False)
        shutil.rmtree(base)
    assert not left, f"left mounted: {left}"
    assert not loops
    assert "internal error" not in log
    assert "Traceback" not in log


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def run(client: Client, image: str, peer: str, *command: str, stdin: bytes = b"", **fields: object) -> Ran:
    """Prepare a container, run its command here, release it."""
    answer = client.ask("prepare", image=image, peers=[peer], command=list(command), hold=True, **fields)
    done = subprocess.run(answer["argv"], input=stdin, capture_output=True, timeout=60, check=False)
    figures = client.ask("release", name=answer["name"])
    return Ran(done.returncode, done.stdout, done.stderr, figures)


@dataclass(frozen=True)
class Ran:
    status: int
    stdout: bytes
    stderr: bytes
    figures: dict[str, object]
