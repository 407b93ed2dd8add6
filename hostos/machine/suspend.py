"""A running machine saved to disk, and brought back.

All of it, its memory too, goes into `saved/` in the machine's directory, which appears in one step
when it is complete. Until then nothing is lost by stopping: the guest goes on. From then on the
saved state is the machine, until it has been brought back and answers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hostos.errors import UserError, failure
from hostos.machine import stop
from hostos.machine.files import Unreadable, read_json, write_json
from hostos.machine.identity import Identity, ensure_identity
from hostos.machine.instance import Instance, Run
from hostos.machine.network import LOOPBACK, Forward
from hostos.machine.options import timeout_scale
from hostos.machine.plan import Memory, choose_ports, forwards
from hostos.machine.process import QemuProcess, spawn
from hostos.machine.qmp import Qmp, QmpError
from hostos.machine.ssh import write_ssh_config
from hostos.paths import private_dir
from hostos.steps import Steps

_SAVE_SECONDS = 300.0
_LOAD_SECONDS = 120.0
_ANSWER_SECONDS = 60.0
# Room for the devices, and for the disk not to be full afterwards.
_SPARE = 64 << 20


def suspend(instance: Instance, steps: Steps) -> int:
    """Save `instance` and end its QEMU; returns the bytes written. The caller holds the lock.

    Raises UserError; the machine then runs on.
    """
    process, run = instance.process(), instance.require_run()
    if process is None:
        raise UserError(f"machine {instance.name!r} is not running", f"hostos up -m {instance.name}")
    if run.net != "user":
        raise UserError(
            f"machine {instance.name!r} has an address of its own ({run.net}), which it could not keep",
            f"power it off: hostos down -m {instance.name}",
        )
    if run.shares:
        raise UserError(
            f"machine {instance.name!r} has directories of the host mounted, which QEMU cannot save",
            f"power it off: hostos down -m {instance.name}",
        )
    _check_room(instance, process, run)
    give_up = time.monotonic() + _SAVE_SECONDS * timeout_scale()
    part = instance.saved_part
    with contextlib.ExitStack() as undo:
        try:
            monitor = Qmp(instance.monitor_socket, process.alive, time.monotonic() + 10.0)
            undo.callback(shutil.rmtree, part, ignore_errors=True)
            # On a connection of its own: this one may be in the middle of something.
            undo.callback(_go_on, instance, process)
            undo.callback(monitor.close)
            shutil.rmtree(part, ignore_errors=True)
            private_dir(part)
            with steps.step("saved") as step:
                monitor.execute("stop", give_up=give_up)
                # A clone was loaded without.
                monitor.leave_memory_out(give_up, leave=False)
                with (part / "state").open("xb") as state:
                    (part / "state").chmod(0o600)
                    monitor.save(state.fileno(), give_up)
                    os.fsync(state.fileno())
                    size = state.seek(0, os.SEEK_END)
                write_json(part / "saved.json", {"at": time.time(), "bytes": size, "command": run.command})
                shutil.rmtree(instance.saved, ignore_errors=True)
                part.rename(instance.saved)
                step.detail = f"{size >> 20} MiB"
        except QmpError as error:
            raise failure(
                f"machine {instance.name!r} could not be saved: {error}",
                f"it runs on; look at: hostos logs --qemu -m {instance.name}",
            ) from error
        # From here on there is nothing to go back to: it is on disk.
        undo.pop_all()
    with contextlib.suppress(QmpError):
        monitor.execute("quit", give_up=time.monotonic() + 5.0)
    monitor.close()
    process.wait(5.0)
    stop.end(instance)
    return size


def resume(instance: Instance, steps: Steps) -> Run:
    """Bring back what `suspend` has saved. The caller holds the lock.

    Raises UserError; the saved state then is still there.
    """
    option = "" if instance.name == "default" else f" -m {instance.name}"
    if instance.saved_part.is_dir() and not instance.saved.is_dir():
        return _go_on_from_interruption(instance, steps)
    try:
        saved = read_json(instance.saved / "saved.json")
    except Unreadable as error:
        raise failure(str(error), f"discard it: hostos up --cold{option}") from error
    if saved is None:
        raise UserError(f"machine {instance.name!r} is not suspended", f"hostos up{option}")
    run = instance.require_run()
    began = time.monotonic()
    with contextlib.ExitStack() as undo:
        # If suspend did not live to end it: it has been halted since.
        stop.end(instance)
        undo.callback(stop.end, instance)
        instance.make_socket_dir()
        ports = choose_ports(run.forwards, Memory(run.ssh_port, run.swarm_port))
        command = resuming(saved["command"], forwards(*ports, run.forwards))
        identity = ensure_identity(instance.identity_dir, instance.name)
        try:
            with steps.step("QEMU started"):
                process = spawn(command, instance.qemu_log)
                run = replace(
                    run,
                    pid=process.pid,
                    process_start=process.start,
                    ready_at=None,
                    ssh_port=ports[0],
                    swarm_port=ports[1],
                    started_at=run.started_at,
                )
                instance.write_run(run)
                write_ssh_config(instance, identity, ports[0])
            with steps.step("state loaded"):
                give_up = time.monotonic() + _LOAD_SECONDS * timeout_scale()
                with (
                    (instance.saved / "state").open("rb") as state,
                    Qmp(instance.monitor_socket, process.alive, give_up) as monitor,
                ):
                    monitor.load(state.fileno(), give_up)
                    monitor.execute("cont", give_up=give_up)
            _check_in(instance, process, identity, run, steps)
        except (QmpError, OSError, UserError) as error:
            why = f"{error.message if isinstance(error, UserError) else error}".splitlines()[0]
            said = instance.qemu_log.read_text(errors="replace").strip().splitlines()[-3:]
            more = "".join(f"\n    | {line}" for line in said)
            raise failure(
                f"machine {instance.name!r} could not be brought back: {why}{more}",
                f"its state is kept in {instance.saved}; try again: hostos resume{option}; "
                f"discard it and boot: hostos up --cold{option}; discard the machine: hostos rm{option}",
            ) from error
        run = instance.mark_ready(
            run, time.time(), [{"name": "resumed", "seconds": round(time.monotonic() - began, 3)}], []
        )
        undo.pop_all()
    shutil.rmtree(instance.saved, ignore_errors=True)
    return run


def discard(instance: Instance, steps: Steps) -> None:
    """Throw the saved state away, and say so."""
    if instance.saved.is_dir() or instance.saved_part.is_dir():
        steps.warning(f"what machine {instance.name!r} was doing when it was suspended is discarded")
        shutil.rmtree(instance.saved, ignore_errors=True)
        shutil.rmtree(instance.saved_part, ignore_errors=True)


def resuming(command: Sequence[str], forwarded: Sequence[Forward]) -> list[str]:
    """The command line that takes in a machine saved from `command`, with its ports where they are now."""
    words: list[str] = []
    skip = False
    for option in command:
        if skip:
            skip = False
            continue
        if option in ("-kernel", "-initrd", "-append", "-incoming"):
            skip = True
            continue
        if option == "-no-reboot":
            continue
        if option == "-netdev":
            words += [option, "user,id=net0" + "".join(f",hostfwd={each.rule()}" for each in forwarded)]
            skip = True
            continue
        if option.startswith("memory-backend-file,"):
            # All of a clone's memory was saved; the template may be gone by now.
            size = next(part for part in option.split(",") if part.startswith("size="))
            option = f"memory-backend-ram,id=ram,{size}"
        words.append(option.removesuffix(",wait=on") + ",wait=off" if option.endswith(",wait=on") else option)
    # Neither kernel nor firmware could boot it again.
    return [*words, "-incoming", "defer", "-no-reboot"]


def _check_room(instance: Instance, process: QemuProcess, run: Run) -> None:
    needed = min(run.memory_mib << 20, process.memory_bytes() or run.memory_mib << 20) + _SPARE
    free = shutil.disk_usage(instance.directory).free
    if free < needed:
        raise UserError(
            f"saving machine {instance.name!r} may take {needed >> 20} MiB; "
            f"{instance.directory} has {free >> 20} MiB left",
            f"make room, or power it off: hostos down -m {instance.name}",
        )


def _go_on(instance: Instance, process: QemuProcess) -> str:
    """Undo a save: the guest runs again. Returns what is wrong if it does not, else ""."""
    fault = ""
    with contextlib.ExitStack() as stack:
        try:
            give_up = time.monotonic() + 10.0
            monitor = stack.enter_context(Qmp(instance.monitor_socket, process.alive, give_up))
            with contextlib.suppress(QmpError):
                monitor.execute("migrate_cancel", give_up=give_up)
            monitor.execute("cont", give_up=give_up)
        except QmpError as error:
            fault = str(error)
    return fault


def _go_on_from_interruption(instance: Instance, steps: Steps) -> Run:
    """`suspend` was killed before all was on disk: the guest is halted, and complete."""
    process = instance.process()
    if process is None:
        shutil.rmtree(instance.saved_part, ignore_errors=True)
        raise UserError(f"machine {instance.name!r} is not suspended", f"hostos up -m {instance.name}")
    with steps.step("goes on"):
        fault = _go_on(instance, process)
        if fault:
            raise failure(f"machine {instance.name!r} does not go on: {fault}", f"hostos kill -m {instance.name}")
    shutil.rmtree(instance.saved_part, ignore_errors=True)
    return instance.require_run()


def _check_in(instance: Instance, process: QemuProcess, identity: Identity, run: Run, steps: Steps) -> None:
    """Log in and set the clock, which has stood still."""
    from hostos.machine.connection import ConnectionLost
    from hostos.machine.readiness import Target, log_in
    from hostos.machine.watch import Watch

    watch = Watch(instance, process, None)
    seconds = _ANSWER_SECONDS * timeout_scale()
    target = Target(LOOPBACK, run.ssh_port)
    with log_in(target, identity, watch, time.monotonic() + seconds, seconds, steps) as guest, steps.step("clock set"):
        try:
            done = guest.run(["date", "-s", f"@{round(time.time())}"], timeout=seconds, watch=watch.check)
        except ConnectionLost as error:
            watch.check_after_loss()
            raise watch.failed(f"the SSH connection broke: {error}") from error
        if done.status != 0:
            steps.warning(f"the guest's clock could not be set: {done.stderr.decode(errors='replace').strip()}")


def saved_facts(instance: Instance) -> dict[str, Any] | None:
    """When it was suspended and how much it takes, None if it is not; raises Unreadable."""
    content = read_json(instance.saved / "saved.json")
    return None if content is None else {"at": content.get("at"), "bytes": content.get("bytes")}
