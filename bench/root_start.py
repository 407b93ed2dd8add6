"""`up --root` over a shaped link, beside downloading the image first and then booting it.

The image is the quick start's Debian, whose files are some 400 MB. The peer downloads all of it with plain
libtorrent, outside of the emulated machine, and then boots it with the same `up --root`, its blocks and metadata on
this host, nothing shaped. Both ends at the first command over SSH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import network
from bench.harness import Comparison, Series
from bench.live import PEER_SCRIPT, PROGRAM, RATE_MBIT, delayed, seed
from bench.live_guest import MEMORY_MIB
from hostos.errors import failure
from hostos.steps import Steps

ROUND_TRIP_MS = 40
NAME = "bench/system"


def measure(rounds: int, net: network.Link, archive: Path, work: Path, steps: Steps) -> list[Comparison]:
    """Raises UserError when a side fails."""
    env = _home(work, "root")
    with steps.step("publish"):
        plain = _hostos(env, "image", "publish", archive, "--name", NAME).strip()
    with steps.step("trace it as a machine's system"):
        traced = _hostos(env, "image", "trace", NAME, "--root").strip()
    _hostos(env, "seed", "stop")
    return compare(rounds, net, (plain, traced), work, steps)


def compare(rounds: int, net: network.Link, images: tuple[str, str], work: Path, steps: Steps) -> list[Comparison]:
    """`images`: without a trace and with one, in the store of the home `work`/root."""
    download, local = Series("download everything"), Series("boot what has been downloaded")
    whole = Series("download, then boot")
    plain, traced = Series("hostos up --root, bare hash, no trace"), Series("hostos up --root, bare hash, with a trace")
    with ExitStack() as stack:
        # Beside the shaped link: a seed of the namespace where the machine is, with all of the image.
        near, far = _home(work, "near"), _home(work, "far")
        (work / "near").mkdir()
        (work / "near/data").symlink_to(work / "root/data")
        stack.callback(subprocess.run, [PROGRAM, "seed", "stop"], env=near, capture_output=True, check=False)
        address = seed(stack, net.enter(net.seed), network.SEED, _home(work, "root"))
        net.shape(RATE_MBIT)
        stack.callback(net.shape, None)
        peer = stack.enter_context(delayed(net, address, ROUND_TRIP_MS))
        enter = net.enter(net.client)
        for number in range(rounds):
            for series, image in zip((plain, traced), images, strict=True):
                with steps.step(f"{series.name} {number + 1}") as step:
                    started = _start(enter, far, image, "--peer", peer)
                    series.samples.append(started.seconds)
                    series.notes = started.notes
                    step.detail = f"{started.seconds:.2f} s, {started.notes}"
            with steps.step(f"{whole.name} {number + 1}") as step:
                download.samples.append(_download(enter, images[1], peer, work / "full"))
                started = _start(enter, near, images[1])
                local.samples.append(started.seconds)
                local.notes = started.notes
                whole.samples.append(download.samples[-1] + started.seconds)
                step.detail = f"{download.samples[-1]:.2f} + {started.seconds:.2f} s"
    return [
        Comparison(
            f"up --root to SSH over {RATE_MBIT} Mbit/s, RTT {ROUND_TRIP_MS} ms",
            whole.name,
            [whole, plain, traced, download, local],
            {traced.name: 0.25},
        )
    ]


def _home(work: Path, name: str) -> dict[str, str]:
    return {**os.environ, "HOSTOS_HOME": str(work / name), "HOSTOS_TEMPLATES": "off"}


@dataclass(frozen=True)
class Started:
    """`seconds` to the first command over SSH; `notes`: its stages, and what was fetched until all had started."""

    seconds: float
    notes: dict[str, Any] = field(default_factory=dict)


def _start(enter: Sequence[str], env: Mapping[str, str], image: str, *more: str) -> Started:
    words = ["up", "--cold", "--accel", "tcg", "--memory", str(MEMORY_MIB), "--root", image, *more, "--json"]
    began = time.monotonic()
    done = _hostos(env, *words, enter=enter)
    seconds = time.monotonic() - began
    stages = {each["name"]: each["seconds"] for each in json.loads(done.splitlines()[-1])["stages"]}
    layer = json.loads(_hostos(env, "container", "stats", "root", "--json", enter=enter))["layers"][0]
    _hostos(env, "kill")
    notes = {
        **{name: round(took, 2) for name, took in stages.items()},
        "MB": round(layer["downloaded"] / 1e6, 1),
        "misses": layer["misses"],
        "seconds waited": round(layer["wait_total"], 2),
    }
    # What is still being started then is not waited for.
    return Started(seconds - stages["system is up"], notes)


def _download(enter: Sequence[str], image: str, peer: str, where: Path) -> float:
    """Seconds for all of the image with plain libtorrent, in the machine's namespace."""
    words = [*enter, sys.executable, str(PEER_SCRIPT), image, peer, str(where)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    shutil.rmtree(where)
    return float(done.stdout)


def _hostos(env: Mapping[str, str], *words: str | Path, enter: Sequence[str] = ()) -> str:
    done = subprocess.run([*enter, PROGRAM, *words], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise failure(f"hostos {words[0]} failed: {done.stderr[-800:]}")
    return done.stdout
