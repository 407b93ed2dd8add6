"""Ending a machine: from asking the guest to killing QEMU."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from hostos.errors import UserError, failure
from hostos.machine import interrupts
from hostos.machine.instance import Instance
from hostos.machine.options import timeout_scale
from hostos.machine.process import QemuProcess, find_all
from hostos.steps import Steps

# Seconds an emulated guest is given to power itself off.
POWER_OFF_SECONDS = 30.0


@dataclass(frozen=True)
class Stopped:
    """How a machine ended. `clean`: the guest powered itself off."""

    how: str
    clean: bool
    seconds: float


def stop(instance: Instance, process: QemuProcess, steps: Steps, *, timeout: float = POWER_OFF_SECONDS) -> Stopped:
    """End `process`, each way only when the one before has failed: power-off over SSH, the power
    button, the monitor's `quit`, SIGTERM, SIGKILL. Raises UserError if even that does not help."""
    began = time.monotonic()
    give_up = timeout * timeout_scale()
    ways: list[tuple[str, Callable[[], str]]] = [
        ("power off over SSH", lambda: _over_ssh(instance, process, give_up)),
        ("power button", lambda: _monitor(instance, process, "system_powerdown", give_up)),
        ("monitor quit", lambda: _monitor(instance, process, "quit", 5.0)),
        ("SIGTERM", lambda: _signal(process, signal.SIGTERM, 5.0)),
        ("SIGKILL", lambda: _signal(process, signal.SIGKILL, 5.0)),
    ]
    for number, (name, way) in enumerate(ways):
        with steps.step(name) as step:
            fault = way()
            if not fault or not process.alive():
                tidy(instance)
                return Stopped(name, number < 2, time.monotonic() - began)
            step.detail = f"in vain: {fault}"
    raise failure(f"QEMU (process {process.pid}) cannot be ended", "it may hang in the kernel: see dmesg")


def end(instance: Instance) -> list[int]:
    """Kill every QEMU of `instance` at once; returns their pids. Raises UserError if one stays."""
    # It undoes what was interrupted, so another Ctrl-C must not interrupt it.
    with interrupts.held():
        processes = find_all(instance.pid_file)
        for process in processes:
            if _signal(process, signal.SIGKILL, 5.0):
                raise failure(f"QEMU (process {process.pid}) cannot be killed", "it may hang in the kernel: see dmesg")
        tidy(instance)
    return [process.pid for process in processes]


def tidy(instance: Instance) -> None:
    """Remove what a machine that has ended needs no more; logs and identity stay."""
    with interrupts.held():
        instance.pid_file.unlink(missing_ok=True)
        instance.initrd.unlink(missing_ok=True)
        for leftover in instance.directory.glob(".*.*"):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(instance.socket_dir, ignore_errors=True)


# Each way returns "" if QEMU has ended, else what went wrong.


def _over_ssh(instance: Instance, process: QemuProcess, seconds: float) -> str:
    from hostos.machine import connection

    patience = min(10.0 * timeout_scale(), seconds)
    try:
        with connection.dial(instance, deadline=patience) as guest:
            # Without logind `systemctl poweroff` asks somebody who isn't there.
            done = guest.run(["systemctl", "start", "--no-block", "poweroff.target"], timeout=patience)
        if done.status != 0:
            return done.stderr.decode(errors="replace").strip() or f"systemctl ended with status {done.status}"
    except UserError as error:
        return error.message
    except connection.ConnectionLost:
        # As it must be if the guest was quicker than its answer.
        pass
    return _wait(process, seconds)


def _monitor(instance: Instance, process: QemuProcess, command: str, seconds: float) -> str:
    from hostos.machine import monitor

    try:
        with monitor.connect(instance.monitor_socket, process.alive, timeout=3.0) as qmp:
            qmp.execute(command)
    except monitor.QemuGone:
        pass
    except monitor.MonitorError as error:
        return str(error)
    return _wait(process, seconds)


def _signal(process: QemuProcess, number: signal.Signals, seconds: float) -> str:
    process.signal(number)
    return _wait(process, seconds)


def _wait(process: QemuProcess, seconds: float) -> str:
    return "" if process.wait(seconds) else f"still there after {seconds:g} s"
