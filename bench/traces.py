"""What a boot trace is worth: the same tree, published without and with one, booted from the bare hash.

Natively in a network namespace, over 50 Mbit/s, with round trips of 0, 40 and 200 ms (`bench.delay`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import network
from bench.harness import Comparison, Series, prepare, publish
from bench.live import client, publish_image, seed, timed, trace
from hostos.image.store import Store
from hostos.steps import Steps

RATE_MBIT = 50
ROUND_TRIPS_MS = (0, 40, 200)
WORK = "python3 -c 'import asyncio, email, http.server, sqlite3, ssl'; git --version; node --version; nginx -v"
COMMAND = ("sh", "-c", f"echo first; {WORK} 2>&1")


def run(rounds: int, steps: Steps) -> Path:
    """Measure and publish. Raises `UserError` without root, or when a side fails."""
    before = prepare()
    comparisons = []
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostos-bench-", dir="/var/tmp")))
        net = stack.enter_context(network.link())
        env = {**os.environ, "HOSTOS_HOME": str(work / "home")}
        plain = publish_image(steps, env)
        address = seed(stack, net.enter(net.seed), network.SEED, env)
        traced = trace(Store(work / "home/data"), plain, net, address, work, (COMMAND,), steps)
        net.shape(RATE_MBIT)
        for round_trip in ROUND_TRIPS_MS:
            comparisons.append(_compare(rounds, round_trip, net, (plain, traced), address, work, env, steps))
    return publish("traces", comparisons, before)


def _compare(
    rounds: int,
    round_trip: int,
    net: network.Link,
    images: tuple[str, str],
    address: str,
    work: Path,
    env: Mapping[str, str],
    steps: Steps,
) -> Comparison:
    names = ("default order", "packed and fetched by trace")
    done = [Series(f"{name}: done") for name in names]
    first = [Series(f"{name}: first output") for name in names]
    with _delayed(net, address, round_trip) as peer:
        for number in range(rounds):
            for which, image in enumerate(images):
                with steps.step(f"{round_trip} ms, {names[which]} {number + 1}") as step:
                    figures = _boot(net, image, peer, work)
                    first[which].samples.append(figures[0])
                    done[which].samples.append(figures[1])
                    done[which].notes = figures[2]
                    step.detail = f"{figures[0]:.2f} s, done {figures[1]:.2f} s, {figures[2]}"
    return Comparison(f"{RATE_MBIT} Mbit/s, round trip {round_trip} ms", done[0].name, [*done, *first])


def _boot(net: network.Link, image: str, peer: str, work: Path) -> tuple[float, float, dict[str, object]]:
    """Seconds from asking to the first output and to the end, and what was fetched."""
    received = network.received(net.client)
    with client(net.enter(net.client), work / "boot") as (asked, _):
        fields = {"image": image, "peers": [peer], "command": list(COMMAND), "name": "b"}
        began, prepared = timed(lambda: asked.ask("prepare", **fields))
        argv = [*net.enter(net.client), *prepared["argv"]]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
            assert run.stdout is not None
            first, _ = timed(lambda: run.stdout.read(1) if run.stdout else b"")
            rest, _ = timed(lambda: run.communicate())
        layer = asked.ask("release", name="b")["layers"][0]
    return (
        began + first,
        began + first + rest,
        {
            "MB received": round((network.received(net.client) - received) / 1e6, 1),
            "misses": layer["misses"],
            "MB wasted": round(layer["wasted"] / 1e6, 1),
            "prefetched": layer["prefetched"],
            "used": layer["prefetch_used"],
        },
    )


@contextmanager
def _delayed(net: network.Link, address: str, round_trip: int) -> Iterator[str]:
    """The seed's address as seen with that round trip (milliseconds)."""
    if not round_trip:
        yield address
        return
    near = f"{network.SEED}:7000"
    words = [*net.enter(net.seed), sys.executable, "-m", "bench.delay", near, address, str(round_trip / 2)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as proxy:
        assert proxy.stdout is not None
        proxy.stdout.readline()
        try:
            yield near
        finally:
            proxy.terminate()
