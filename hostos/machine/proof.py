"""Proof that an accelerator runs guests: a machine of 64 MiB executes until it prints a byte.

On x86 that is QEMU's own firmware, whose debug output (port 0x402, docs of SeaBIOS) comes after
some milliseconds of real mode and protected mode code, so no OS build is needed. Other
architectures have no firmware by default: there a kernel is started, which prints before it needs
a root file system.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from pathlib import Path

from hostos.errors import UserError
from hostos.machine import qemu
from hostos.machine.accel import Name

# SeaBIOS prints within 0.1 s, emulated on a loaded host within 2 s.
PROOF_SECONDS = 8.0
_KEPT = 4096


def prove(accelerator: Name, binary: Path, arch: str, kernel: Path | None, *, seconds: float | None = None) -> str:
    """Start a throw-away guest; returns "" once it has printed something, else what went wrong.

    `kernel` is needed for all but x86_64 guests. Raises UserError if there is none.
    """
    seconds = PROOF_SECONDS if seconds is None else seconds
    with subprocess.Popen(
        _command(accelerator, binary, arch, kernel),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
    ) as child:
        assert child.stdout
        assert child.stderr
        try:
            ready = select.select([child.stdout], [], [], seconds)[0]
            if ready and os.read(child.stdout.fileno(), _KEPT):
                return ""
            # The end of its output comes a moment before its last words, and those before its end.
            status = _status(child) if ready else None
        finally:
            child.kill()
        said = child.stderr.read(_KEPT).decode("utf-8", "replace").strip().splitlines()
    first = next((line for line in said if "warning:" not in line), "")
    if status is None:
        return f"a guest printed nothing within {seconds:g} s" + (f": {first}" if first else "")
    return f"QEMU ended with status {status}: {first or 'it said nothing'}"


def _status(child: subprocess.Popen[bytes]) -> int | None:
    give_up = time.monotonic() + 2.0
    while child.poll() is None and time.monotonic() < give_up:
        time.sleep(0.02)
    return child.poll()


def _command(accelerator: Name, binary: Path, arch: str, kernel: Path | None) -> list[str]:
    # fmt: off
    line = [str(binary), "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", qemu.machine_type(arch, accelerator), "-accel", accelerator,
            "-cpu", qemu.cpu_model(arch, accelerator), "-m", "64M", "-chardev", "stdio,id=said"]
    # fmt: on
    if arch == "x86_64":
        return [*line, "-device", "isa-debugcon,iobase=0x402,chardev=said"]
    if kernel is None:
        raise UserError("there is no kernel to prove it with", "build an OS first: invoke build")
    return [*line, "-serial", "chardev:said", "-kernel", str(kernel), "-append", "earlycon"]
