"""A machine's disk made bigger, also while the machine runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hostos.errors import UserError, failure
from hostos.machine.disk import human, normalise, parse_size, plan_disk
from hostos.machine.files import Unreadable, write_json
from hostos.machine.instance import Instance
from hostos.machine.lock import locked
from hostos.machine.plan import remembered_options

STORE = "/var/lib/hostos"
_GROW = ("/usr/lib/systemd/systemd-growfs", STORE)
_WAIT_FOR_OTHERS = 10.0
_SECONDS = 60.0


@dataclass(frozen=True)
class Grown:
    """`now`: the guest has the room already; else at its next start."""

    size: int
    now: bool


def grow(instance: Instance, text: str) -> Grown:
    """Make the disk `text` big. Raises UserError: it has none of its own, is bigger already."""
    with locked(instance.lock_file, instance.name, "disk grow", wait=_WAIT_FOR_OTHERS):
        try:
            options = remembered_options(instance)
        except Unreadable as error:
            raise UserError(str(error), f"hostos up -m {instance.name} starts it from the defaults") from error
        size = parse_size(text)
        if size is None:
            raise UserError(f"{text!r} is not a size", "e.g. hostos disk grow 40G")
        if options.disk is None or parse_size(normalise(options.disk)) is None:
            raise UserError(
                f"machine {instance.name!r} has no disk of its own",
                f"hostos up --disk {text} gives it one at its start",
            )
        # It says whether that can be, and whether it would be shrinking.
        planned = plan_disk(text, instance.directory)
        state, why = instance.state(locked=True)
        if state in ("interrupted", "unresponsive"):
            raise UserError(f"machine {instance.name!r} is {state}: {why}", f"hostos status -m {instance.name}")
        run = instance.require_run() if state == "running" else None
        running = planned is not None and run is not None and run.disk == str(planned.file)
        if running:
            _lengthen(instance, size)
        # From here on the file is longer, and its next start must not take that for shrinking.
        write_json(instance.config_file, replace(options, disk=text).to_json())
        if running:
            _grow_file_system(instance)
    return Grown(size, running)


def _lengthen(instance: Instance, size: int) -> None:
    from hostos.machine import monitor

    process = instance.process()
    try:
        with monitor.connect(instance.monitor_socket, process.alive if process else lambda: False, timeout=5.0) as qmp:
            # The guest is told by its disk; the file is made longer by QEMU, which has it locked.
            qmp.execute("block_resize", {"node-name": "disk", "size": size}, timeout=20.0)
    except monitor.MonitorError as error:
        raise failure(
            f"QEMU cannot make the disk {human(size)}: {error}", f"hostos status -m {instance.name}"
        ) from error


def _grow_file_system(instance: Instance) -> None:
    from hostos.machine import connection

    try:
        with connection.dial(instance, deadline=_SECONDS) as guest:
            done = guest.run(list(_GROW), timeout=_SECONDS)
    except connection.ConnectionLost as error:
        raise failure(f"the guest's file system has not grown: {error}", "it does at its next start") from error
    if done.status != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise failure(f"the guest's file system has not grown: {said}", "it does at its next start")
