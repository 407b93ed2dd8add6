"""Command to the container's first output: hostos beside downloading everything first.

Natively in a network namespace and inside the emulated guest; over 50 Mbit/s and unshaped; both sides
start from the bare hash. The image is the quick start's Debian.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from bench import network
from bench.harness import Comparison, Series, machine, publish
from hostos.errors import failure
from hostos.live.client import Client, connect
from hostos.quickstart import demonstration_image
from hostos.steps import Steps

Result = TypeVar("Result")

RATE_MBIT = 50
COMMAND = ("python3", "-c", "print(1)")
EXPECTED = b"1\n"
PEER_SCRIPT = Path(__file__).parent / "download_first.py"
DEADLINE_S = 300.0
MEMORY_MIB = 2048
PROGRAM = str(Path(sys.executable).parent / "hostos")


def run(rounds: int, steps: Steps) -> Path:
    """Measure and publish. Raises `UserError` without root, or when a side fails."""
    before = machine()
    comparisons = []
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostos-bench-", dir="/var/tmp")))
        net = stack.enter_context(network.link())
        env = {**os.environ, "HOSTOS_HOME": str(work / "home")}
        image = publish_image(steps, env)
        peer = seed(stack, net, env)
        for rate in (RATE_MBIT, None):
            net.shape(rate)
            comparisons.append(_native(rounds, rate, net, image, peer, work, steps))
        net.shape(RATE_MBIT)
        comparisons.append(_guest(rounds, net, image, peer, work, env, steps))
    return publish("live", comparisons, before)


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


def seed(stack: ExitStack, net: network.Link, env: Mapping[str, str]) -> str:
    started = [*net.enter(net.seed), PROGRAM, "seed", "start", "--listen", network.SEED, "--json"]
    info = json.loads(subprocess.run(started, env=env, stdout=subprocess.PIPE, check=True).stdout)
    stack.callback(subprocess.run, [PROGRAM, "seed", "stop"], env=env, stderr=subprocess.DEVNULL, check=False)
    return f"{network.SEED}:{info['port']}"


def _native(
    rounds: int, rate: int | None, net: network.Link, image: str, peer: str, work: Path, steps: Steps
) -> Comparison:
    link = f"{rate} Mbit/s" if rate else "unshaped"
    lazy, full = Series("hostos, native, bare hash"), Series("download everything, then boot")
    shares = []
    for number in range(rounds):
        with steps.step(f"{link}: hostos {number + 1}") as step:
            seconds, share = _native_lazy(net, image, peer, work)
            lazy.samples.append(seconds)
            shares.append(share)
            step.detail = f"{seconds:.2f} s, {100 * share:.1f} % fetched"
        with steps.step(f"{link}: download first {number + 1}") as step:
            where = work / "full"
            command = [*net.enter(net.client), sys.executable, str(PEER_SCRIPT), image, peer, str(where), *COMMAND]
            full.samples.append(_first_output(command))
            shutil.rmtree(where)
            step.detail = f"{full.samples[-1]:.2f} s"
    lazy.notes["fetched share of the image, worst"] = max(shares)
    goal = 0.12 if rate else 1.1
    return Comparison(f"first output over {link}, native", full.name, [full, lazy], {lazy.name: goal})


def _native_lazy(net: network.Link, image: str, peer: str, work: Path) -> tuple[float, float]:
    """(seconds from starting the client to the first output, share of the image received)."""
    before = network.received(net.client)
    began = time.monotonic()
    with client(net, work / "lazy") as asked:
        prepared = asked.ask("prepare", image=image, peers=[peer], command=list(COMMAND), name="bench")
        started = time.monotonic()
        seconds = started - began + _first_output([*net.enter(net.client), *prepared["argv"]])
        asked.ask("release", name="bench")
    share = (network.received(net.client) - before) / prepared["size"]
    return seconds, share


@contextmanager
def client(net: network.Link, place: Path) -> Iterator[Client]:
    """A live-boot client that has just started in the namespace, with nothing cached."""
    place.mkdir()
    socket = place / "live.sock"
    began = time.monotonic()
    daemon = [
        *net.enter(net.client), sys.executable, "-m", "hostos.live", "--no-systemd", f"--socket={socket}",
        f"--cache={place / 'cache'}", f"--mounts={place / 'mounts'}",
    ]  # fmt: skip
    try:
        with _process(daemon, place / "log"):
            while not socket.exists():
                if time.monotonic() - began > DEADLINE_S:
                    raise failure(f"the live-boot client did not start: {(place / 'log').read_text()}")
                time.sleep(0.005)
            with connect(socket) as asked:
                yield asked
    finally:
        shutil.rmtree(place)


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that it took, and what it gave."""
    began = time.monotonic()
    result = function()
    return time.monotonic() - began, result


def _guest(
    rounds: int, net: network.Link, image: str, peer: str, work: Path, seed_env: Mapping[str, str], steps: Steps
) -> Comparison:
    lazy, full = Series("hostos, in the guest, bare hash"), Series("download everything in the guest, then boot")
    # A home of its own: the machine must not find the image in the seed's store.
    env = {**seed_env, "HOSTOS_HOME": str(work / "guest")}
    enter = net.enter(net.client)
    for number in range(rounds):
        with steps.step(f"guest: hostos {number + 1}") as step:
            with _machine(enter, env):
                command = [*enter, PROGRAM, "container", "boot", image, "--peer", peer, "--", *COMMAND]
                lazy.samples.append(_first_output(command, env))
            step.detail = f"{lazy.samples[-1]:.2f} s"
        with steps.step(f"guest: download first {number + 1}") as step:
            with _machine(enter, env):
                remote = ["python3", "-", image, peer, "/run/bench", *COMMAND]
                command = [*enter, PROGRAM, "ssh", "--", shlex.join(remote)]
                full.samples.append(_first_output(command, env, stdin=PEER_SCRIPT.read_bytes()))
            step.detail = f"{full.samples[-1]:.2f} s"
    return Comparison(
        f"first output over {RATE_MBIT} Mbit/s, inside the emulated guest", full.name, [full, lazy], {lazy.name: 0.25}
    )


@contextmanager
def _machine(enter: Sequence[str], env: Mapping[str, str]) -> Iterator[None]:
    """A machine that has just booted, with an empty cache."""
    up = [*enter, PROGRAM, "up", "--cold", "--accel", "tcg", "--memory", str(MEMORY_MIB)]
    done = subprocess.run(up, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise failure(f"hostos up failed: {done.stderr}")
    # The client starts behind SSH; what is measured is a machine at rest: its answer says that it is up.
    subprocess.run([*enter, PROGRAM, "container", "ls"], env=env, stdout=subprocess.DEVNULL, check=True)
    try:
        yield
    finally:
        subprocess.run([PROGRAM, "kill"], env=env, capture_output=True, check=False)


def _first_output(command: Sequence[str], env: Mapping[str, str] | None = None, *, stdin: bytes = b"") -> float:
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
def _process(command: Sequence[str], log: Path) -> Iterator[None]:
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
