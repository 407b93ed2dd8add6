"""Live boot inside the emulated guest, beside downloading the whole image there first."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench import network
from bench.harness import Comparison, Series
from bench.live import COMMAND, PEER_SCRIPT, PROGRAM, RATE_MBIT, first_byte
from hostos.errors import failure
from hostos.live import emulated
from hostos.steps import Steps

MEMORY_MIB = 2048
# The client does so by itself when emulated (hostos/live/emulated.py); the peer must not lose by that.
PLAIN_HASHES = f"{emulated.VARIABLE}={emulated.PLAIN}"


def measure(
    rounds: int,
    net: network.Link,
    images: tuple[str, str],
    peer: str,
    work: Path,
    seed_env: Mapping[str, str],
    steps: Steps,
) -> Comparison:
    """`images`: without a trace and with one."""
    full = Series("download everything in the guest, then boot")
    lazy, traced = Series("hostos, in the guest, bare hash"), Series("hostos, in the guest, bare hash, with a trace")
    # A home of its own: the machine must not find the image in the seed's store.
    env = {**seed_env, "HOSTOS_HOME": str(work / "guest")}
    enter = net.enter(net.client)
    for number in range(rounds):
        for series, image in zip((lazy, traced), images, strict=True):
            with steps.step(f"guest: {series.name} {number + 1}") as step:
                with _machine(enter, env):
                    command = [*enter, PROGRAM, "container", "boot", image, "--peer", peer, "--", *COMMAND]
                    series.samples.append(first_byte(command, env))
                step.detail = f"{series.samples[-1]:.2f} s"
        with steps.step(f"guest: download first {number + 1}") as step:
            with _machine(enter, env):
                remote = ["env", PLAIN_HASHES, "python3", "-", images[0], peer, "/run/bench", *COMMAND]
                command = [*enter, PROGRAM, "ssh", "--", shlex.join(remote)]
                full.samples.append(first_byte(command, env, stdin=PEER_SCRIPT.read_bytes()))
            step.detail = f"{full.samples[-1]:.2f} s"
    return Comparison(
        f"first output over {RATE_MBIT} Mbit/s, inside the emulated guest",
        full.name,
        [full, lazy, traced],
        {lazy.name: 0.25},
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
