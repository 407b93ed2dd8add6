"""A running machine's memory made less and more again: QEMU's balloon (virtio-balloon), which --reclaim gives it.

The guest is asked for pages, which go back to the host; asked for fewer, it has them again. So a machine is started
with the most it may ever have. (VIRTIO 1.2, 5.5; QMP: balloon, query-balloon.)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hostos.errors import UserError, failure
from hostos.machine import os_image
from hostos.machine.disk import parse_size
from hostos.machine.instance import Instance, Run
from hostos.machine.lock import locked
from hostos.machine.options import timeout_scale

if TYPE_CHECKING:
    from hostos.machine.monitor import Monitor

_WAIT_FOR_OTHERS = 10.0
# An emulated guest gives up about 200 MiB a second.
_SECONDS = 60.0
_POLL = 0.1
# A guest that is given no more for this long gives no more.
_STUCK_SECONDS = 10.0


@dataclass(frozen=True)
class Memory:
    """MiB: what the guest has now, and the most it can have."""

    now_mib: int
    most_mib: int


def look(instance: Instance) -> Memory:
    """What `instance` has. Raises UserError unless it runs."""
    run = instance.require_running()
    return _talk(instance, lambda qmp: Memory(_now(qmp), run.memory_mib)) if run.reclaim else _fixed(run)


def resize(instance: Instance, text: str) -> Memory:
    """Let the guest have `text` (`512`, MiB, or `2G`).

    Raises UserError: no balloon, not that much, or the guest needs more; it then has what it had.
    """
    size = parse_size(f"{text}M" if text.isdecimal() else text)
    if size is None:
        raise UserError(f"{text!r} is not an amount of memory", "e.g. hostos memory 512, or 2G")
    wanted = size >> 20
    with locked(instance.lock_file, instance.name, "memory", wait=_WAIT_FOR_OTHERS):
        state, why = instance.state(locked=True)
        if state != "running":
            raise UserError(
                f"machine {instance.name!r} is not running: it is {state}" + (f" ({why})" if why else ""),
                f"hostos up -m {instance.name} --memory {wanted}",
            )
        run = instance.require_run()
        _check(instance, run, wanted)
        return _talk(instance, lambda qmp: _inflate(instance, qmp, wanted, run.memory_mib))


def _check(instance: Instance, run: Run, wanted: int) -> None:
    if not run.reclaim:
        raise UserError(
            f"the memory of machine {instance.name!r} is fixed",
            f"start it with --reclaim: hostos restart cannot; hostos down, hostos up --reclaim -m {instance.name}",
        )
    if wanted > run.memory_mib:
        raise UserError(
            f"machine {instance.name!r} was started with {run.memory_mib} MiB and cannot have more",
            f"hostos down, hostos up --memory {wanted} -m {instance.name}",
        )
    least = _least(run)
    if wanted < least:
        raise UserError(f"{wanted} MiB is too little: the OS alone needs {least}", f"hostos memory {least}")


def _least(run: Run) -> int:
    from pathlib import Path

    try:
        return os_image.load(Path(run.os_directory)).min_memory_mib
    except UserError:
        # Built anew or gone since.
        return 1


def _fixed(run: Run) -> Memory:
    return Memory(run.memory_mib, run.memory_mib)


def _inflate(instance: Instance, qmp: Monitor, wanted: int, most: int) -> Memory:
    had = now = _now(qmp)
    qmp.execute("balloon", {"value": wanted << 20})
    give_up = time.monotonic() + _SECONDS * timeout_scale()
    moved_at = time.monotonic()
    while now != wanted:
        time.sleep(_POLL)
        before, now = now, _now(qmp)
        if now != before:
            moved_at = time.monotonic()
        if time.monotonic() > min(give_up, moved_at + _STUCK_SECONDS * timeout_scale()):
            qmp.execute("balloon", {"value": had << 20})
            raise failure(
                f"the guest of {instance.name!r} gave its memory down to {now} MiB and no more; it has {had} again",
                f"what it has free: hostos run -m {instance.name} -- free -m",
            )
    return Memory(now, most)


def _now(qmp: Monitor) -> int:
    return int(qmp.execute("query-balloon")["actual"]) >> 20


def _talk(instance: Instance, ask: Callable[[Monitor], Memory]) -> Memory:
    from hostos.machine import monitor

    process = instance.process()
    try:
        with monitor.connect(instance.monitor_socket, process.alive if process else lambda: False, timeout=5.0) as qmp:
            return ask(qmp)
    except monitor.MonitorError as error:
        raise failure(f"QEMU does not say: {error}", f"hostos status -m {instance.name}") from error
