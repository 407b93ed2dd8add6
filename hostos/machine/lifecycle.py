"""Machines suspended, brought back, restarted and removed."""

from __future__ import annotations

import shutil

from hostos.errors import UserError
from hostos.machine import launcher, stop
from hostos.machine import suspend as saving
from hostos.machine.guard import at_work
from hostos.machine.instance import Instance
from hostos.machine.options import UpOptions
from hostos.steps import Steps


def suspend(name: str, steps: Steps) -> int:
    """Save machine `name` to disk and end it; returns the bytes written.

    If it fails or is interrupted the machine runs on. Raises UserError.
    """
    instance = Instance.load(name)
    with at_work(instance, "suspend"):
        state, why = instance.state(locked=True)
        if state != "running" and not (state == "suspended" and why):
            raise UserError(
                f"machine {name!r} is not running: it is {state}" + (f" ({why})" if why else ""),
                f"hostos resume -m {name}" if state == "suspended" else f"hostos up -m {name}",
            )
        return saving.suspend(instance, steps)


def resume(name: str, steps: Steps) -> Instance:
    """Bring a suspended machine back. Raises UserError; what was saved is kept then."""
    instance = Instance.load(name)
    with at_work(instance, "resume"):
        saving.resume(instance, steps)
    return instance


def restart(name: str, options: UpOptions, steps: Steps, *, timeout: float = stop.POWER_OFF_SECONDS) -> Instance:
    """Power machine `name` off, if it runs, and start it again. Raises UserError."""
    instance = Instance.load(name)
    with at_work(instance, "restart"):
        if instance.state(locked=True)[0] == "suspended":
            raise UserError(f"machine {name!r} is suspended", f"hostos resume {name}; or hostos up --cold -m {name}")
        process = instance.process()
        if process is not None:
            stop.stop(instance, process, steps, timeout=timeout)
        launcher.start_or_resume(instance, options, steps)
    return instance


def remove(name: str, *, force: bool = False) -> None:
    """Delete machine `name` with its keys and logs. Raises UserError if it runs, unless `force`."""
    instance = Instance.load(name)
    with at_work(instance, "rm"):
        state, why = instance.state(locked=True)
        if state not in ("stopped", "broken", "interrupted") and not force:
            option = "" if name == "default" else f" -m {name}"
            raise UserError(
                f"machine {name!r} is {state}" + (f" ({why})" if why else ""),
                f"hostos down{option} first, or hostos rm --force{option}: what it is doing is lost",
            )
        stop.end(instance)
        # In one step: whoever looks sees a machine or none.
        aside = instance.directory.with_name(f".{name}.removed")
        shutil.rmtree(aside, ignore_errors=True)
        instance.directory.rename(aside)
        shutil.rmtree(aside)
