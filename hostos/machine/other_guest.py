"""Guests of other makers: a kernel and an initrd given by path.

Their kernel command line gets the hostname and the first key both our way and HyperOS's
(`host=NAME sshkey="KEY"`), and our archive is appended to their initrd: an OS of ours boots as
ever. Of others only that can be known which shows from outside: that they print, that something
greets like an SSH server, or that they have fallen silent.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hostos.errors import UserError
from hostos.machine.identity import Identity
from hostos.machine.instance import Instance
from hostos.machine.network import LOOPBACK
from hostos.machine.options import timeout_scale
from hostos.machine.os_image import OsImage
from hostos.machine.readiness import Deadlines, Target, first_life, greeted, system_state
from hostos.machine.watch import Watch
from hostos.steps import Steps

# "system": all rungs, as with an OS of ours. "ssh": an SSH server greets, which isn't ours or does
# not take our key. "console": it has printed, and fallen silent. "nothing": not even that.
Reached = Literal["system", "ssh", "console", "nothing"]

# A guest that has said nothing for so long, and has no SSH server, is not expected to get one.
SILENT_SECONDS = 20.0
_CONSOLES = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}
_HEADER = 0x400
# An SSH server that greets and breaks the connection off may only just be starting.
_LOGINS = 5
_LOGIN_PAUSE = 0.5


@dataclass(frozen=True)
class Outcome:
    """How far it came, and the units that failed in it (with systemd)."""

    reached: Reached
    failed_units: list[str]


def load(kernel: Path, initrd: Path | None) -> OsImage:
    """`kernel` and `initrd` as an OS. Raises UserError for what QEMU would not boot."""
    kernel = kernel.expanduser().absolute()
    arch, version = _identify(kernel, _beginning(kernel, "kernel"))
    if initrd is not None:
        initrd = initrd.expanduser().absolute()
        if _is_kernel(initrd, _beginning(initrd, "initrd")):
            raise UserError(f"{initrd} is a kernel, not an initrd", "are --kernel and --initrd the wrong way round?")
    return OsImage(
        directory=kernel.parent,
        profile="by path",
        arch=arch,
        cmdline=f"console={_CONSOLES[arch]}",
        kernel_version=version,
        min_memory_mib=1,
        files=(),
        # Without one the kernel gets our archive alone.
        by_path=(kernel, initrd or Path("/dev/null")),
    )


def _is_kernel(path: Path, data: bytes) -> bool:
    try:
        return bool(_identify(path, data))
    except UserError:
        return False


def _beginning(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(1 << 16)
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}", f"give the path of a file: --{what} FILE") from None
    if len(data) < _HEADER:
        raise UserError(f"{what} {path} has {len(data)} bytes: that is none", f"give the path of a file: --{what} FILE")
    return data


def _identify(path: Path, data: bytes) -> tuple[str, str]:
    """Architecture and version of a kernel, from its header; raises UserError if it is none.

    Formats: Documentation/arch/x86/boot.rst, Documentation/arch/arm64/booting.rst of Linux, ELF.
    """
    if data[0x202:0x206] == b"HdrS":
        (offset,) = struct.unpack_from("<H", data, 0x20E)
        text = data[offset + 0x200 :].partition(b"\0")[0] if offset else b""
        return "x86_64", text.decode("ascii", "replace").split(" ")[0][:64]
    if data[0x38:0x3C] == b"ARMd":
        return "aarch64", ""
    if data[:4] == b"\x7fELF":
        (machine,) = struct.unpack_from("<H", data, 18)
        arch = {62: "x86_64", 183: "aarch64"}.get(machine)
        if arch:
            return arch, ""
        raise UserError(f"{path} is for another architecture (ELF machine {machine})", "x86_64 and aarch64 boot")
    raise UserError(f"{path} is no Linux kernel", "give a bzImage, an arm64 Image, or an ELF vmlinux: --kernel FILE")


def arguments(hostname: str, key_lines: Sequence[str]) -> str:
    """What HyperOS reads from the kernel command line. Its key must not hold quotes: no comment."""
    words = [f"host={hostname}"]
    if key_lines:
        words.append(f'sshkey="{" ".join(key_lines[0].split()[:2])}"')
    return " ".join(words)


class _SilentWatch(Watch):
    """Also notices that the guest has stopped printing."""

    def __init__(self, watch: Watch, seconds: float) -> None:
        super().__init__(watch.instance, watch.process, watch.total)
        self.began = watch.began
        self.seconds = seconds
        self._length = -1
        self._since = time.monotonic()

    def check(self) -> None:
        super().check()
        if self._read != self._length:
            self._length, self._since = self._read, time.monotonic()
        elif time.monotonic() - self._since > self.seconds:
            raise _Silent


class _Silent(Exception):  # noqa: N818
    pass


def climb(
    instance: Instance, identity: Identity, watch: Watch, port: int, deadlines: Deadlines, steps: Steps
) -> Outcome:
    """Wait until it is known how far the guest comes. Raises UserError, AcceleratorFailed, PortTaken."""
    first_life(instance, watch, deadlines, steps)
    from hostos.machine import connection as ssh

    silent = _SilentWatch(watch, SILENT_SECONDS * timeout_scale())
    give_up = time.monotonic() + deadlines.banner
    name = f"-m {instance.name}"
    refusal = ""
    for _ in range(_LOGINS):
        with steps.step("SSH answers, or silence") as step:
            try:
                sock = greeted(Target(LOOPBACK, port), silent, give_up)
            except _Silent:
                step.detail = f"the console has been silent for {silent.seconds:g} s"
                break
        try:
            with ssh.login(sock, identity, deadlines.login) as guest, steps.step("system is up") as step:
                return Outcome("system", system_state(guest, watch, deadlines.system, step))
        except ssh.ConnectionLost as error:
            watch.check_after_loss()
            refusal = f"it gives up on each login ({error})"
        except UserError as error:
            refusal = error.message
            break
        time.sleep(_LOGIN_PAUSE)
    console = f"Its console: hostos console {name}"
    if refusal:
        steps.warning(
            f"an SSH server answers, but it is not ours to use: {refusal}. "
            f"With a key of yours: ssh -p {port} USER@{LOOPBACK} (HyperOS: tc). {console}"
        )
        return Outcome("ssh", [])
    if watch.spoke:
        steps.warning(f"the guest runs, but no SSH server answers in it. {console}")
        return Outcome("console", [])
    words = " or ".join(f"console={each}" for each in _CONSOLES.values())
    steps.warning(f"the guest runs, but has printed nothing and no SSH server answers. Does it need --append {words}?")
    return Outcome("nothing", [])
