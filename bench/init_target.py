"""Until a container's init has started everything, beside downloading the whole image first, and from a local copy."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench import network
from bench.harness import Comparison, Series
from bench.live import PEER_SCRIPT, RATE_MBIT, Target, boot, client, delayed, first_byte
from hostos.live.client import Client
from hostos.steps import Steps

ROUND_TRIP_MS = 40
DOWNLOAD_GOAL = 0.20
"""Of the time that downloading everything, then booting takes."""
LINK_GOAL = 1.15
"""Of (bytes of the pieces that were read ÷ rate of the link) + the init's own time from a local copy."""


def until_ready(argv: Sequence[str]) -> float:
    """Seconds until the init of the container that `argv` starts has started everything; it is ended then."""
    return first_byte([sys.executable, "-m", "bench.until_ready", *argv])


def measure(rounds: int, net: network.Link, target: Target, plain: Target, steps: Steps) -> list[Comparison]:
    """`target`: with a trace of the init."""
    traced, untraced = Series("hostos, bare hash"), Series("hostos, bare hash, no trace")
    full, local = Series("download everything, then boot"), Series("from a local copy")
    bound = Series("what was read over the link, then from a local copy")
    enter = net.enter(net.client)
    with delayed(net, target.peer, ROUND_TRIP_MS) as there:
        for number in range(rounds):
            read = 0
            for series, image in ((traced, target), (untraced, plain)):
                with steps.step(f"init: {series.name} {number + 1}") as step:
                    seconds, touched = _lazy(net, replace(image, peer=there))
                    series.samples.append(seconds)
                    read = read or touched
                    step.detail = f"{seconds:.2f} s, {touched / 1e6:.1f} MB read"
            with steps.step(f"init: download first {number + 1}") as step:
                where = target.work / "full"
                command = [*enter, sys.executable, str(PEER_SCRIPT), target.image, there]
                full.samples.append(first_byte([*command, str(where), "--boot"]))
                step.detail = f"{full.samples[-1]:.2f} s"
            with steps.step(f"init: from a local copy {number + 1}") as step:
                (layer,) = where.glob("*.squashfs")
                copy = [*enter, sys.executable, str(PEER_SCRIPT), str(layer), "-", str(where / "again"), "--boot"]
                local.samples.append(_without_start(first_byte(copy), enter))
                bound.samples.append(read * 8 / (RATE_MBIT * 1e6) + local.samples[-1])
                shutil.rmtree(where)
                step.detail = f"{local.samples[-1]:.2f} s"
    link = f"{RATE_MBIT} Mbit/s, RTT {ROUND_TRIP_MS} ms, native"
    return [
        Comparison(
            f"the init has started everything, {link}",
            full.name,
            [full, traced, untraced, local],
            {traced.name: DOWNLOAD_GOAL},
        ),
        Comparison(f"the same, beside the link's limit, {link}", bound.name, [bound, traced], {traced.name: LINK_GOAL}),
    ]


def _lazy(net: network.Link, target: Target) -> tuple[float, int]:
    """(seconds from starting the client until the init has started everything, bytes of the pieces read)."""
    enter = net.enter(net.client)
    began = time.monotonic()
    with client(enter, target.work / "lazy") as (asked, _):
        seconds, _ = system_up(asked, enter, replace(target, bundle=None), began)
        layers = asked.ask("timeline", name="bench")["layers"]
        return seconds, sum(len(layer["read"]) * layer["piece_size"] for layer in layers)


def system_up(
    asked: Client, enter: Sequence[str], target: Target, began: float, **how: Any
) -> tuple[float, dict[str, Any]]:
    """Seconds since `began` until the init has started everything, and what the client said. `how`: see `boot`."""
    return boot(asked, enter, target, began, until_ready, init=True, command=[], **how)


def _without_start(seconds: float, enter: Sequence[str]) -> float:
    """Less what starting the script takes that mounts the copy."""
    began = time.monotonic()
    subprocess.run([*enter, sys.executable, "-c", "import libtorrent, subprocess, pathlib"], check=True)
    return seconds - (time.monotonic() - began)
