"""This host's clock is set while a machine starts, runs and is suspended: nobody takes it for another machine.

The clock of the machine the tests run on is left alone: the launcher is given another one, and psutil another moment
of this host's boot, which is how a clock that was set shows in the start times of processes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.boot, pytest.mark.fault]

DAY = 86400.0
CLOCK = """
import time
from pathlib import Path
import psutil
set_by = lambda: float(Path({file!r}).read_text())
time.time = lambda real=time.time: real() + set_by()
psutil._pslinux.boot_time = lambda real=psutil._pslinux.boot_time: real() + set_by()
from hostos.cli import main
main()
"""


class Clock:
    """The launcher's. `set`: how many seconds it is ahead of the real one."""

    def __init__(self, hostos: Any) -> None:
        self.file: Path = hostos.home.parent / "clock"
        self.set(0.0)
        program = CLOCK.format(file=str(self.file))
        hostos.words = lambda *words: [sys.executable, "-c", program, *map(str, words)]

    def set(self, seconds: float) -> None:
        self.seconds = seconds
        part = self.file.with_suffix(".part")
        part.write_text(str(seconds))
        part.replace(self.file)

    def time(self) -> float:
        return time.time() + self.seconds


def start(hostos: Any, clock: Clock, stage: str, seconds: float, *words: str) -> dict[str, Any]:
    """`hostos up`, with the clock set to `seconds` when `stage` is done."""
    up = hostos.start("up", "--os", hostos.os_dir, "--memory", "192", "--json", *words)
    events = []
    for line in up.stdout:
        events.append(json.loads(line))
        if (events[-1]["kind"], events[-1].get("step")) == ("done", stage):
            clock.set(seconds)
    _, err = up.communicate(timeout=300)
    assert up.returncode == 0, err.decode()
    assert clock.seconds == seconds, events
    facts: dict[str, Any] = events[-1]
    return facts


def is_the_same(hostos: Any, pid: int) -> None:
    facts = hostos("status", "--json").json()
    assert (facts["state"], facts["pid"]) == ("running", pid)
    assert 0 <= facts["uptime_seconds"] < 1800
    assert hostos("run", "--", "echo", "fine").ok().out == "fine\n"
    refused = hostos.up()
    assert refused.status == 2
    assert "is running already" in refused.err
    assert hostos.qemus() == [pid]


@pytest.mark.parametrize("jump", [400 * DAY, -400 * DAY], ids=["forward", "back"])
def test_while_it_boots_and_runs(hostos: Any, jump: float) -> None:
    clock = Clock(hostos)
    facts = start(hostos, clock, "QEMU started", jump)
    assert all(0 <= stage["seconds"] < 600 for stage in facts["stages"])
    is_the_same(hostos, facts["pid"])
    clock.set(-jump)
    is_the_same(hostos, facts["pid"])
    assert hostos("down", "--json").json()["clean"] is True


def test_while_it_is_cloned_and_suspended(hostos: Any) -> None:
    clock = Clock(hostos)
    facts = start(hostos, clock, "template loaded", 3 * DAY, "--warm")
    assert facts["template"]
    is_the_same(hostos, facts["pid"])
    clock.set(-9 * DAY)
    hostos("suspend").ok()
    assert hostos("status", "--json").json()["state"] == "suspended"
    clock.set(30 * DAY)
    hostos("resume").ok()
    # The guest gets the time there is now.
    assert abs(float(hostos("run", "--", "date", "+%s").ok().out) - clock.time()) < 120
    clock.set(-30 * DAY)
    is_the_same(hostos, hostos("status", "--json").json()["pid"])
    assert hostos("down", "--json").json()["clean"] is True
