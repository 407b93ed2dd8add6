"""Several clients at once over one seed's slow link: how much longer than one alone, because they share."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

from bench import network
from bench.harness import Comparison, Series
from bench.init_target import system_up
from bench.live import PROGRAM, RATE_MBIT, Target, client, first_output, seed
from hostos.live.client import Client
from hostos.steps import Steps

SEED_MBIT = 20
COUNTS = (1, 3, 8)
GOALS = {3: 1.3, 8: 1.5}


@dataclass(frozen=True)
class Case:
    """What they boot. `init`: until it has started everything, not only the first output; `lan`: they look for each
    other on the local network, else the seed tells them of each other; `limited`: the links are."""

    target: Target
    how: str
    init: bool = False
    lan: bool = True
    limited: bool = True


def measure(rounds: int, target: Target, plain: Target, env: Mapping[str, str], steps: Steps) -> list[Comparison]:
    """Time until the last of them has its first output, and until its init has started everything.

    All begin at once, with the metadata at hand. `target`: with a trace of both.
    """
    cases = (
        Case(target, ""),
        Case(target, ", told by the seed", lan=False),
        Case(plain, ", no trace"),
        Case(target, ", whole system", init=True),
        Case(target, ", whole system, told by the seed", init=True, lan=False),
        # What so many at once cost the processors of one machine.
        Case(target, ", whole system, no limit", init=True, limited=False),
    )
    with ExitStack() as stack:
        net = stack.enter_context(network.crowd(max(COUNTS)))
        # The seed of the other comparisons is in another network.
        subprocess.run([PROGRAM, "seed", "stop"], env=env, stderr=subprocess.DEVNULL, check=True)
        peer = seed(stack, net.enter(net.seed), net.address, env)
        return [_measure(rounds, net, peer, case, steps) for case in cases]


def _measure(rounds: int, net: network.Crowd, peer: str, case: Case, steps: Steps) -> Comparison:
    net.shape(*((SEED_MBIT, RATE_MBIT) if case.limited else (None, None)))
    series = {count: Series(f"{count} client{'s' if count > 1 else ''} at once{case.how}") for count in COUNTS}
    for number in range(rounds):
        for count in COUNTS:
            with steps.step(f"{series[count].name}, {number + 1}") as step:
                before = network.sent(net.seed)
                series[count].samples.append(_together(count, net, peer, case))
                megabytes = (network.sent(net.seed) - before) / 1e6
                series[count].notes.setdefault("sent by the seed, MB", []).append(round(megabytes, 2))
                step.detail = f"{series[count].samples[-1]:.2f} s, the seed sent {megabytes:.1f} MB"
    goals = {series[count].name: goal for count, goal in GOALS.items()} if case.limited else {}
    what = "until the last client's init has started everything" if case.init else "first output of the last client"
    links = f"one seed at {SEED_MBIT} Mbit/s, clients at {RATE_MBIT}" if case.limited else "unshaped"
    return Comparison(f"{what}, {links}{case.how}", series[1].name, list(series.values()), goals)


def _together(count: int, net: network.Crowd, peer: str, case: Case) -> float:
    names, target = net.clients[:count], replace(case.target, peer=peer)
    until = system_up if case.init else first_output

    def boot(asked: Client, name: str) -> float:
        return until(asked, net.enter(name), target, began, swarm={"lan": case.lan})[0]

    with ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        clients = [stack.enter_context(client(net.enter(name), target.work / name))[0] for name in names]
        began = time.monotonic()
        return max(pool.map(boot, clients, names))
