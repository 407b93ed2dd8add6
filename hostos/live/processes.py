"""Looking at processes without guessing: by descriptor, so that a reused number is never meant."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import trio

HALT = signal.SIGRTMIN + 3
"""Tells systemd, and nspawn's own PID 1, to shut the container down (systemd(1))."""


class Process:
    """A process that is not our child. Raises ProcessLookupError if it is gone already."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._descriptor = os.pidfd_open(number)

    @property
    def alive(self) -> bool:
        # Readable once it has ended, even if its parent has not asked how; signal 0 still reaches it then.
        ready = select.poll()
        ready.register(self._descriptor, select.POLLIN)
        return not ready.poll(0)

    def send(self, number: int) -> None:
        """Send a signal; nothing happens if it has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    async def ended(self) -> None:
        # A copy, as only one task may wait for a descriptor.
        copy = os.dup(self._descriptor)
        try:
            await trio.lowlevel.wait_readable(copy)
        finally:
            os.close(copy)

    def close(self) -> None:
        os.close(self._descriptor)


def parent(stat: str) -> int:
    """The parent's number in the text of /proc/PID/stat. The program's name may contain anything."""
    return int(stat.rpartition(")")[2].split()[1])


def children(number: int) -> Iterator[int]:
    for name in os.listdir("/proc"):  # noqa: PTH208 (it is asked often, and paths are slow to make)
        if name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                if parent(Path(f"/proc/{name}/stat").read_text(errors="replace")) == number:
                    yield int(name)


def is_first(number: int) -> bool:
    """Whether this process is PID 1 of a PID namespace below ours (proc(5), NSpid)."""
    with suppress(OSError, IndexError):
        for line in Path(f"/proc/{number}/status").read_text(errors="replace").splitlines():
            if line.startswith("NSpid:"):
                numbers = line.split()[1:]
                return len(numbers) > 1 and numbers[-1] == "1"
    return False


def leader(supervisor: int) -> int | None:
    """The first process of the container that this systemd-nspawn supervises, once there is one."""
    return next((child for child in children(supervisor) if is_first(child)), None)
