"""Making a template: boot a machine that belongs to nobody, wait until all is up, save it.

It never sees a key: it is told that it is a template, so its sshd waits before it has read its
configuration, and its journal has not begun (overlay/usr/lib/hostos/template, identity).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hostos.errors import UserError, failure
from hostos.machine import qemu, template
from hostos.machine.files import write_json
from hostos.machine.identity import combine_initrd
from hostos.machine.lock import locked
from hostos.machine.options import timeout_scale
from hostos.machine.os_image import OsImage
from hostos.machine.process import QemuProcess, find_all, spawn
from hostos.machine.qemu import Config
from hostos.machine.qmp import Qmp, QmpError, dial
from hostos.machine.template import Template
from hostos.machine.watch import clean
from hostos.paths import private_dir, runtime_dir
from hostos.steps import Steps

# An emulated machine is up in 3 s; one at the lowest priority on a busy host takes as long as it takes.
_BOOT_SECONDS = 240.0
_SAVE_SECONDS = 60.0
# How long it may take until it has nothing more to do, and how much of a CPU in half a second is nothing.
_IDLE_SECONDS = 10.0
_IDLE_CPU = 0.05
_TAIL = 12


def bake(config: Config, image: OsImage, steps: Steps, *, wait: float = 0.0, force: bool = False) -> Template:
    """The template for machines like `config`, made if there is none (or `force`).

    One is made at a time; `wait`: seconds to wait for another hostos that is at it. An interrupted
    one leaves nothing that is taken for a template. Raises UserError, OSError.
    """
    why = template.why_not(config, image)
    if why:
        raise UserError(f"there can be no template: {why}", "start without --warm")
    key = template.key_of(config, image)
    place = private_dir(template.templates_dir())
    with _one_at_a_time(place / "lock", wait):
        _sweep(place)
        made = template.find(key)
        if made and not made.failed and not force:
            return made
        directory = place / f".{key}.part"
        with contextlib.ExitStack() as undo:
            undo.callback(_discard, directory)
            private_dir(directory)
            sockets = runtime_dir() / "t" / key[:12]
            undo.callback(shutil.rmtree, sockets, ignore_errors=True)
            private_dir(sockets)
            _make(template.baking(config, image, directory, sockets), image, key, undo, steps)
            if made:
                template.remove(made)
            directory.rename(place / key)
        template.prune(template.limit_bytes(), keep=key)
    finished = template.find(key)
    if finished is None:
        raise failure(f"the template in {place / key} was removed while it was made", "try again")
    return finished


@contextlib.contextmanager
def _one_at_a_time(path: Path, wait: float) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, "template", "template bake", wait=wait))
        except UserError as error:
            raise failure("another hostos makes a template at the moment", "wait for it to end") from error
        yield


def _make(config: Config, image: OsImage, key: str, undo: contextlib.ExitStack, steps: Steps) -> None:
    """Boot, save and end it; `undo` ends it in any case."""
    directory = config.pid_file.parent
    assert config.ram is not None
    began = time.monotonic()
    with steps.step("template booted"):
        combine_initrd(image.initrd(config.memory_mib), template.archive(), config.initrd)
        config.ram.file.touch(0o600)
        log = directory / "qemu.log"
        process = spawn(qemu.command(config), log)
        undo.callback(_end, config.pid_file)
        try:
            give_up = time.monotonic() + _BOOT_SECONDS * timeout_scale()
            # The guest must not see its port close before it is saved.
            agent = undo.enter_context(dial(config.agent_socket, process.alive, give_up))
            _wait_until_up(process, agent, give_up)
        except QmpError as error:
            raise failure(
                f"the template did not boot: {error}{_tail(config.serial_log, log)}", "start without --warm"
            ) from error
    with steps.step("template saved") as step:
        try:
            _save(config, process, directory / "state")
        except QmpError as error:
            raise failure(f"the template could not be saved: {error}{_tail(config.serial_log, log)}") from error
        _end(config.pid_file)
        for spare in (config.initrd, config.pid_file, config.serial_log, log):
            spare.unlink(missing_ok=True)
        dig_holes(config.ram.file)
        (directory / "state").chmod(0o400)
        write_json(
            directory / "template.json",
            {
                "protocol": template.PROTOCOL,
                "made_at": time.time(),
                "seconds": round(time.monotonic() - began, 2),
                "os": str(image.directory),
                "kernel_version": image.kernel_version,
                "memory_mib": config.memory_mib,
                "cpus": config.cpus,
                "qemu": str(config.binary),
                "accelerator": config.accelerator,
                "command": qemu.command(config),
            },
        )
        size = sum(each.stat().st_blocks * 512 for each in directory.iterdir())
        step.detail = f"{size >> 20} MiB"


def in_the_background(machine: str, os_directory: Path) -> None:
    """Have the template for `machine` made by a process of its own, at the lowest priority. Never fails."""
    words = ["template", "bake", "--background", "-m", machine, "--os", str(os_directory)]
    with (
        contextlib.suppress(OSError, UserError),
        (private_dir(template.templates_dir()) / "bake.log").open("wb") as log,
    ):
        subprocess.Popen(
            [sys.executable, "-c", "from hostos.cli import main; main()", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )


def _wait_until_up(process: QemuProcess, agent: socket.socket, give_up: float) -> None:
    agent.settimeout(0.25)
    said = b""
    while b"template\n" not in said:
        try:
            data = agent.recv(4096)
            if not data:
                raise QmpError("QEMU ended")
            said += data
        except TimeoutError:
            if not process.alive():
                raise QmpError("QEMU ended") from None
            if time.monotonic() > give_up:
                raise QmpError(f"it was not up within {_BOOT_SECONDS:.0f} s") from None
    # What it is busy with for another moment would be repeated by every clone.
    idle_by = time.monotonic() + _IDLE_SECONDS
    while time.monotonic() < idle_by:
        before = process.cpu_seconds()
        time.sleep(0.5)
        if process.cpu_seconds() - before < _IDLE_CPU:
            return


def _save(config: Config, process: QemuProcess, target: Path) -> None:
    give_up = time.monotonic() + _SAVE_SECONDS * timeout_scale()
    with target.open("xb") as state, Qmp(config.monitor_socket, process.alive, give_up) as monitor:
        monitor.execute("stop", give_up=give_up)
        monitor.leave_memory_out(give_up)
        monitor.save(state.fileno(), give_up)
        os.fsync(state.fileno())


def _end(pid_file: Path) -> None:
    for process in find_all(pid_file):
        process.signal(signal.SIGKILL)
        process.wait(5.0)


def _discard(directory: Path) -> None:
    _end(directory / "qemu.pid")
    shutil.rmtree(directory, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Remove what interrupted ones have left; the caller holds the lock."""
    for leftover in place.glob(".*"):
        if leftover.suffix in (".part", ".old"):
            _discard(leftover)


def _tail(log: Path, *others: Path) -> str:
    """What the guest and QEMU said last, for an error message."""
    lines = []
    for path in (log, *others):
        with contextlib.suppress(OSError):
            lines += [clean(line) for line in path.read_text(errors="replace").splitlines()[-_TAIL:]]
    return "".join(f"\n    | {line}" for line in lines if line)


def dig_holes(path: Path) -> None:
    """Give back the blocks of a file that hold nothing but zeros, where there is fallocate(1) and the file
    system can; elsewhere the file stays as large as it is."""
    with contextlib.suppress(OSError):
        subprocess.run(["fallocate", "--dig-holes", path], capture_output=True, check=False)
