"""Several clients at once over one seed's slow link: how much longer than one alone, because they share."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from bench import network
from bench.harness import Comparison, Series
from bench.init_target import system_up
from bench.live import PROGRAM, Target, client, first_output, seed
from hostos.live.client import Client
from hostos.steps import Steps

RATE_MBIT = 20
COUNTS = (1, 3, 8)
GOALS = {3: 1.3, 8: 1.5}


def measure(rounds: int, target: Target, plain: Target, env: Mapping[str, str], steps: Steps) -> list[Comparison]:
    """Time until the last of them has its first output, and until its init has started everything.

    All begin at once, with the metadata at hand. `target`: with a trace of both.
    """
    with ExitStack() as stack:
        net = stack.enter_context(network.crowd(max(COUNTS)))
        # The seed of the other comparisons is in another network.
        subprocess.run([PROGRAM, "seed", "stop"], env=env, stderr=subprocess.DEVNULL, check=True)
        peer = seed(stack, net.enter(net.seed), net.address, env)
        net.shape(RATE_MBIT)
        found = []
        for image, init, how in ((target, False, ""), (plain, False, ", no trace"), (target, True, ", whole system")):
            series = {count: Series(f"{count} client{'s' if count > 1 else ''} at once{how}") for count in COUNTS}
            for number in range(rounds):
                for count in COUNTS:
                    with steps.step(f"{series[count].name}, {number + 1}") as step:
                        before = network.sent(net.seed)
                        series[count].samples.append(_together(count, net, peer, image, init))
                        megabytes = (network.sent(net.seed) - before) / 1e6
                        series[count].notes.setdefault("sent by the seed, MB", []).append(round(megabytes, 2))
                        step.detail = f"{series[count].samples[-1]:.2f} s, the seed sent {megabytes:.1f} MB"
            goals = {series[count].name: goal for count, goal in GOALS.items()}
            what = "until the last client's init has started everything" if init else "first output of the last client"
            title = f"{what}, one seed, everybody at {RATE_MBIT} Mbit/s{how}"
            found.append(Comparison(title, series[1].name, list(series.values()), goals))
        return found


def _together(count: int, net: network.Crowd, peer: str, target: Target, init: bool) -> float:
    names = net.clients[:count]

    def boot(asked: Client, name: str) -> float:
        if init:
            return system_up(asked, net.enter(name), target.image, peer, target.bundle, began)[0]
        return first_output(asked, net.enter(name), target.image, peer, target.bundle, began)[0]

    with ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        clients = [stack.enter_context(client(net.enter(name), target.work / name))[0] for name in names]
        began = time.monotonic()
        return max(pool.map(boot, clients, names))
