"""QEMU processes: started, found again by a later command, ended.

A process is ours if the command line it runs with names our pid file; so neither a reused pid nor
a process that was started by a command killed a moment later can be mistaken.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from hostos.machine import interrupts

# Kept so that a child of this very process is reaped and its exit status known.
_children: dict[int, subprocess.Popen[bytes]] = {}


class QemuProcess:
    """One QEMU, ours or somebody else's child."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.pid: int = process.pid
        self.start: str = start_of(process.pid)

    def alive(self) -> bool:
        child = _children.get(self.pid)
        if child is not None:
            return child.poll() is None
        try:
            return bool(self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def exit_status(self) -> int | None:
        """As `subprocess.Popen.returncode`; None while it runs or when it is not our child."""
        child = _children.get(self.pid)
        return child.poll() if child else None

    def cpu_seconds(self) -> float:
        """Processor time it has used; 0.0 if it is gone."""
        try:
            times = self._process.cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def age_seconds(self) -> float:
        """How long ago it was started, whatever was done to this host's clock; 0.0 if it is gone."""
        try:
            return age_of(self.pid)
        except psutil.Error:
            return 0.0

    def memory_bytes(self) -> int:
        """Memory it holds now; 0 if it is gone."""
        try:
            return int(self._process.memory_info().rss)
        except psutil.Error:
            return 0

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within `seconds`."""
        child = _children.get(self.pid)
        try:
            if child is not None:
                child.wait(seconds)
            else:
                self._process.wait(seconds)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            return not self.alive()
        return True


def age_of(pid: int) -> float:
    """Seconds since the process `pid` was started, whatever was done to this host's clock.

    Linux: in steps of 10 ms (psutil's times may be off by half a second, as the kernel tells the boot in whole ones).
    Raises psutil.NoSuchProcess.
    """
    if sys.platform == "linux":
        ticks = int(start_of(pid).rpartition("/")[2])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return max(0.0, time.time() - float(psutil.Process(pid).create_time()))


def start_of(pid: int) -> str:
    """When the process `pid` was started, as a word that stays the same as long as it lives and that no other
    process with this pid has, also when this host's clock is set.

    Linux: the boot and the clock ticks since it (proc_pid_stat(5), field 22; psutil's times move with the clock).
    Elsewhere the kernel keeps the time of day there was then, which ps prints. Raises psutil.NoSuchProcess.
    """
    if sys.platform == "linux":
        boot = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        try:
            # The second field is the program's name in parentheses, in which anything may stand.
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            return f"{boot}/{int(fields[19])}"
        except (OSError, IndexError):
            raise psutil.NoSuchProcess(pid) from None
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    shown = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, env=environment, check=False
    )
    if shown.returncode or not shown.stdout.strip():
        raise psutil.NoSuchProcess(pid)
    return " ".join(shown.stdout.split())


def spawn(command: Sequence[str], log: Path) -> QemuProcess:
    """Start `command` in a session of its own (a Ctrl-C at the terminal is not for it).

    What it says goes to `log`. Raises OSError.
    """
    for pid, child in list(_children.items()):
        if child.poll() is not None:
            del _children[pid]
    # Whoever ends what an interrupt has left finds it by its command line, which it has once it is QEMU.
    with interrupts.held(), log.open("wb") as out:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
        )
        _children[child.pid] = child
        _as_nice(child.pid)
        return QemuProcess(psutil.Process(child.pid))


def lowest_priority() -> None:
    """For this process, which leads a session, and what it starts."""
    os.nice(19)
    _as_nice(os.getpid())


def _as_nice(pid: int) -> None:
    """Give the session that `pid` leads our own priority.

    Linux shares processors out among sessions first (sched(7), "The autogroup feature"), and a new one starts at
    the usual priority however nice its processes are.
    """
    nice = os.nice(0)
    if nice:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def find(pid_file: Path) -> QemuProcess | None:
    """The running QEMU that wrote `pid_file`, if any."""
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return None
    return _if_ours(pid, pid_file)


def find_all(pid_file: Path) -> list[QemuProcess]:
    """Every running QEMU that was told to write `pid_file`, even if it has not yet."""
    ours = (_if_ours(pid, pid_file) for pid in psutil.pids() if _may_be_ours(pid, os.fsencode(pid_file)))
    return [process for process in ours if process]


def _may_be_ours(pid: int, word: bytes) -> bool:
    """A first look, several times cheaper than psutil's: a start looks at every process there is."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:  # noqa: PTH123
            return word in stream.read()
    except OSError:
        # No such process, or no such file system.
        return not os.path.isdir("/proc/self")  # noqa: PTH112


def _if_ours(pid: int, pid_file: Path) -> QemuProcess | None:
    try:
        process = psutil.Process(pid)
        line = process.cmdline()
        found = QemuProcess(process)
    except (psutil.Error, OSError, ValueError, OverflowError):
        return None
    named = any(line[place : place + 2] == ["-pidfile", os.fspath(pid_file)] for place in range(len(line)))
    return found if named and found.alive() else None
