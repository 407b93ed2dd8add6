"""Live boot over a shaped link, beside downloading the whole image first with plain libtorrent.

Natively in a network namespace and inside the emulated guest; over 50 Mbit/s at several round trips and unshaped;
from the bare hash and with the metadata at hand, published with a boot trace and without. Then what it costs the
client, and several clients at once. The image is the quick start's Debian.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from bench import network
from bench.harness import Comparison, Series, chosen, prepare, publish
from hostos.errors import failure
from hostos.image import retrace
from hostos.image.recording import Recording, from_reads
from hostos.image.store import Store
from hostos.live.client import Client, connect
from hostos.quickstart import demonstration_image
from hostos.steps import Steps

Result = TypeVar("Result")

RATE_MBIT = 50
# By round trip, ms: against download-everything, with the metadata at hand and from the bare hash.
GOALS = {0: (0.08, 0.10), 40: (0.09, 0.12), 150: (0.15, 0.25)}
DELAY_PORT = 6998
PARTS = ("native", "init", "btfs", "cost", "guest", "crowd")
COMMAND = ("python3", "-c", "print(1)")
EXPECTED = b"1\n"
PEER_SCRIPT = Path(__file__).parent / "download_first.py"
DEADLINE_S = 300.0
PROGRAM = str(Path(sys.executable).parent / "hostos")


def run(rounds: int, steps: Steps, only: Sequence[str] = ()) -> Path:
    """Measure and publish. `only`: some of `PARTS`. Raises `UserError` without root, or when a side fails."""
    from bench import btfs, crowd, init_target, live_guest

    parts = chosen(only, PARTS)
    before = prepare()
    comparisons = []
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostos-bench-", dir="/var/tmp")))
        net = stack.enter_context(network.link())
        env = {**os.environ, "HOSTOS_HOME": str(work / "home")}
        image = publish_image(steps, env)
        peer = seed(stack, net.enter(net.seed), network.SEED, env)
        store = Store(work / "home/data")
        traced = trace(store, image, net, peer, work, (COMMAND, ()), steps)
        target, plain = (Target(each, peer, json.loads(store.bundle(each).to_json()), work) for each in (traced, image))
        for part in parts:
            net.shape(RATE_MBIT)
            match part:
                case "native":
                    comparisons += _native_all(rounds, net, target, plain, steps)
                case "init":
                    comparisons += init_target.measure(rounds, net, target, plain, steps)
                case "btfs":
                    layer = next((store.layers_dir / store.get(image).manifest.layers[0].torrent).iterdir())
                    comparisons.append(btfs.measure(rounds, net, target, plain, layer, steps))
                case "cost":
                    net.shape(None)
                    comparisons += cost(rounds, net, plain, steps)
                case "guest":
                    comparisons.append(live_guest.measure(rounds, net, (image, traced), peer, work, env, steps))
                case "crowd":
                    comparisons += crowd.measure(rounds, target, plain, env, steps)
    return publish("live", comparisons, before)


@dataclass(frozen=True)
class Target:
    """What is booted: `bundle` is its metadata (None: it comes from the peer), `work` a directory for everything."""

    image: str
    peer: str
    bundle: dict[str, Any] | None
    work: Path


def _native_all(rounds: int, net: network.Link, target: Target, plain: Target, steps: Steps) -> list[Comparison]:
    comparisons = []
    for milliseconds, goals in GOALS.items():
        with delayed(net, target.peer, milliseconds) as there:
            both = replace(target, peer=there), replace(plain, peer=there)
            comparisons.append(_native(rounds, RATE_MBIT, milliseconds, net, *both, goals, steps))
    net.shape(None)
    return [*comparisons, _native(rounds, None, 0, net, target, plain, (1.0, 1.0), steps)]


@contextmanager
def delayed(net: network.Link, peer: str, milliseconds: int) -> Iterator[str]:
    """The peer at that round trip time: where it then is."""
    if not milliseconds:
        yield peer
        return
    there = f"{network.SEED}:{DELAY_PORT}"
    command = [*net.enter(net.seed), sys.executable, "-m", "bench.delay", there, peer, str(milliseconds / 2)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise failure("the delay proxy did not start")
        yield there
    finally:
        process.terminate()
        process.communicate()


def publish_image(steps: Steps, env: Mapping[str, str]) -> str:
    tar = demonstration_image(steps)
    with steps.step("publish"):
        done = subprocess.run(
            [PROGRAM, "image", "publish", tar, "--name", "bench/debian"],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return done.stdout.strip()


def trace(
    store: Store,
    plain: str,
    net: network.Link,
    peer: str,
    work: Path,
    commands: Sequence[tuple[str, ...]],
    steps: Steps,
) -> str:
    """What `hostos image trace --also` does, without a machine: the image's hash afterwards. No command: its init."""
    from bench import init_target

    image, workloads = store.get(plain), []
    with retrace.twin(store, image, steps) as (twin, layout):
        for command in commands:
            with client(net.enter(net.client), work / "trace") as (asked, _):
                what = {"command": list(command), "init": not command}
                prepared = asked.ask("prepare", image=twin, peers=[peer], name="t", trace=True, **what)
                argv = [*net.enter(net.client), *prepared["argv"]]
                if command:
                    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
                else:
                    init_target.until_ready(argv)
                asked.ask("release", name="t")
                reads = [tuple(each) for each in asked.ask("reads", name="t")["reads"]]
            workloads.append(from_reads(command, reads, layout, 0))
    return retrace.repack(store, image, Recording(tuple(workloads)), steps)


def seed(stack: ExitStack, enter: Sequence[str], address: str, env: Mapping[str, str]) -> str:
    started = [*enter, PROGRAM, "seed", "start", "--listen", address, "--json"]
    info = json.loads(subprocess.run(started, env=env, stdout=subprocess.PIPE, check=True).stdout)
    stack.callback(subprocess.run, [PROGRAM, "seed", "stop"], env=env, stderr=subprocess.DEVNULL, check=False)
    return f"{address}:{info['port']}"


def _native(
    rounds: int,
    rate: int | None,
    milliseconds: int,
    net: network.Link,
    target: Target,
    plain: Target,
    goals: tuple[float, float],
    steps: Steps,
) -> Comparison:
    """`plain`: without a trace. Goals: with the metadata at hand, and from the bare hash."""
    link = f"{rate} Mbit/s, RTT {milliseconds} ms" if rate else "unshaped"
    at_hand, bare = Series("hostos, native, metadata at hand"), Series("hostos, native, bare hash")
    untraced = Series("hostos, native, bare hash, no trace")
    full = Series("download everything, then boot")
    shares = []
    for number in range(rounds):
        unknown = replace(target, bundle=None), replace(plain, bundle=None)
        for series, booted in ((at_hand, target), (bare, unknown[0]), (untraced, unknown[1])):
            with steps.step(f"{link}: {series.name} {number + 1}") as step:
                seconds, share = _native_lazy(net, booted)
                series.samples.append(seconds)
                shares.append(share)
                step.detail = f"{seconds:.2f} s, {100 * share:.1f} % fetched"
        with steps.step(f"{link}: download first {number + 1}") as step:
            where = target.work / "full"
            command = [*net.enter(net.client), sys.executable, str(PEER_SCRIPT), target.image, target.peer]
            full.samples.append(first_byte([*command, str(where), *COMMAND]))
            shutil.rmtree(where)
            step.detail = f"{full.samples[-1]:.2f} s"
    bare.notes["fetched share of the image, worst"] = max(shares)
    title = f"first output over {link}, native"
    return Comparison(title, full.name, [full, at_hand, bare, untraced], {at_hand.name: goals[0], bare.name: goals[1]})


def _native_lazy(net: network.Link, target: Target) -> tuple[float, float]:
    """(seconds from starting the client to the first output, share of the image received)."""
    before = network.received(net.client)
    began = time.monotonic()
    with client(net.enter(net.client), target.work / "lazy") as (asked, _):
        seconds, prepared = first_output(asked, net.enter(net.client), target, began)
    share = (network.received(net.client) - before) / prepared["size"]
    return seconds, share


def first_output(
    asked: Client, enter: Sequence[str], target: Target, began: float, **how: Any
) -> tuple[float, dict[str, Any]]:
    """Seconds since `began` to the first output of the container, and what the client said of it. `how`: see `boot`."""
    return boot(asked, enter, target, began, first_byte, command=list(COMMAND), **how)


def boot(
    asked: Client, enter: Sequence[str], target: Target, began: float, run: Callable[[Sequence[str]], float], **how: Any
) -> tuple[float, dict[str, Any]]:
    """Seconds since `began` until what `run` waits for, and what the client said of the container.

    `how`: what else it is told.
    """
    where = {"image": target.image, "peers": [target.peer], "bundle": target.bundle}
    prepared = asked.ask("prepare", **where, **how, name="bench")
    started = time.monotonic()
    seconds = started - began + run([*enter, *prepared["argv"]])
    asked.ask("release", name="bench")
    return seconds, prepared


def cost(rounds: int, net: network.Link, target: Target, steps: Steps) -> list[Comparison]:
    """What a boot costs the client, and how fast it reads a layer from end to end beside plain libtorrent."""
    cpu, memory = Series("processor time of the client for one boot"), Series("its memory at most", "MB")
    plain, through = Series("plain libtorrent download"), Series("read from end to end through the mount")
    enter = net.enter(net.client)
    for number in range(rounds):
        with steps.step(f"cost {number + 1}") as step:
            with client(enter, target.work / "lazy") as (asked, process):
                first_output(asked, enter, target, time.monotonic())
                times = psutil.Process(process.pid).cpu_times()
                cpu.samples.append(times.user + times.system)
                status = Path(f"/proc/{process.pid}/status").read_text()
                memory.samples.append(int(status.partition("VmHWM:")[2].split()[0]) / 1000)
            step.detail = f"{cpu.samples[-1]:.2f} s, {memory.samples[-1]:.0f} MB"
        with steps.step(f"from end to end {number + 1}") as step:
            with client(enter, target.work / "lazy") as (asked, _):
                where = {"image": target.image, "peers": [target.peer], "bundle": target.bundle}
                asked.ask("mount", **where, name="whole")
                layer = asked.ask("stats", name="whole")["layers"][0]["layer"]
                began = time.monotonic()
                _read(target.work / "lazy/mounts/fuse" / layer)
                seconds = time.monotonic() - began
                through.samples.append(seconds)
                asked.ask("unmount", name="whole")
            step.detail = f"{seconds:.2f} s"
        with steps.step(f"plain libtorrent {number + 1}") as step:
            where_to = target.work / "plain"
            command = [*enter, sys.executable, str(PEER_SCRIPT), target.image, target.peer, str(where_to)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            plain.samples.append(float(done.stdout))
            shutil.rmtree(where_to)
            step.detail = f"{plain.samples[-1]:.2f} s"
    return [
        Comparison("processor time of the client", cpu.name, [cpu]),
        Comparison("memory of the client", memory.name, [memory]),
        # At least 0.8 of its throughput.
        Comparison("a whole layer, unshaped", plain.name, [plain, through], {through.name: 1.25}),
    ]


def _read(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 20):
            pass


@contextmanager
def client(enter: Sequence[str], place: Path) -> Iterator[tuple[Client, subprocess.Popen[bytes]]]:
    """A live-boot client that has just started in the namespace, with nothing cached, and its process."""
    place.mkdir()
    socket = place / "live.sock"
    began = time.monotonic()
    daemon = [
        *enter, sys.executable, "-m", "hostos.live", "--no-systemd", f"--socket={socket}",
        f"--cache={place / 'cache'}", f"--mounts={place / 'mounts'}",
    ]  # fmt: skip
    try:
        with _process(daemon, place / "log") as process:
            while not socket.exists():
                if time.monotonic() - began > DEADLINE_S:
                    raise failure(f"the live-boot client did not start: {(place / 'log').read_text()}")
                time.sleep(0.005)
            with connect(socket) as asked:
                yield asked, process
    finally:
        shutil.rmtree(place)


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that it took, and what it gave."""
    began = time.monotonic()
    result = function()
    return time.monotonic() - began, result


def first_byte(command: Sequence[str], env: Mapping[str, str] | None = None, *, stdin: bytes = b"") -> float:
    """Seconds until the first byte of the command's output, which must be what the container prints."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdin is not None
        assert process.stdout is not None
        with process:
            process.stdin.write(stdin)
            process.stdin.close()
            first = process.stdout.read(1)
            seconds = time.monotonic() - began
            rest = process.stdout.read()
        errors.seek(0)
        if first + rest.replace(b"\r", b"") != EXPECTED:
            raise failure(
                f"{' '.join(command[:8])} … printed {first + rest!r}; {errors.read().decode(errors='replace')}"
            )
    return seconds


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
