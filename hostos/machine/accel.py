"""Which accelerator runs the guest, and proof that it can.

A device node proves little: on some hosts `/dev/kvm` opens, answers its version and creates a VM,
and no guest ever executes an instruction. So the device is asked, the CPU's flags are read, and
the launcher still watches for the guest's first output (`FIRST_OUTPUT_SECONDS`); what it learns is
remembered until the host boots again, or has another kernel, QEMU or CPU.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hostos.errors import UserError
from hostos.machine.files import Unreadable, read_json, write_json
from hostos.machine.os_image import host_arch
from hostos.paths import cache_dir, private_dir

Name = Literal["kvm", "hvf", "tcg"]
CHOICES = ("auto", "kvm", "hvf", "tcg")

DEVICE = Path("/dev/kvm")
CPUINFO = Path("/proc/cpuinfo")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

# A guest under working KVM prints within 0.5 s; nested and loaded hosts are given room.
FIRST_OUTPUT_SECONDS = 8.0
SLOWDOWN = "about 5 to 10 times slower than with KVM; the guest still boots in seconds"

# linux/kvm.h
_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_API_VERSION = 12


@dataclass(frozen=True)
class Choice:
    """The accelerator to use.

    `reason`: why, for people. `fallback`: if it turns out not to run guests, TCG may take over.
    `fault`: what this start has found out about the one tried before, "" if nothing.
    """

    name: Name
    reason: str
    fallback: bool = False
    fault: str = ""


def choose(requested: str, arch: str) -> Choice:
    """The accelerator for a guest of `arch`; `requested` is one of CHOICES.

    Raises UserError if one is asked for by name and certainly cannot work.
    """
    if requested == "tcg":
        return Choice("tcg", "asked for")
    if arch != host_arch():
        if requested == "auto":
            return Choice("tcg", f"an {arch} guest on an {host_arch()} host is emulated")
        raise UserError(f"{requested} cannot run an {arch} guest on an {host_arch()} host", "use --accel tcg")
    mac = platform.system() == "Darwin"
    if requested == "hvf":
        if not mac:
            raise UserError("hvf exists on macOS only", "use --accel auto")
        return Choice("hvf", "asked for")
    if requested == "kvm":
        fault = kvm_device_fault()
        if fault:
            raise UserError(f"KVM cannot be used: {fault}", "use --accel tcg (or auto)")
        return Choice("kvm", "asked for")
    if mac:
        return Choice("hvf", "macOS hypervisor framework", fallback=True)
    fault = kvm_device_fault() or kvm_cpu_fault() or remembered_fault()
    if fault:
        return Choice("tcg", f"KVM cannot be used: {fault}")
    return Choice("kvm", "device and CPU flags are there", fallback=True)


def kvm_device_fault() -> str:
    """What `/dev/kvm` refuses to do, "" if it creates a VM."""
    import fcntl

    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"there is no {DEVICE}"
    except PermissionError:
        return f"{DEVICE} may not be opened (is this user in group kvm?)"
    except OSError as error:
        return f"{DEVICE}: {error.strerror}"
    try:
        version = fcntl.ioctl(device, _KVM_GET_API_VERSION, 0)
        if version != _KVM_API_VERSION:
            return f"{DEVICE} speaks API version {version}, not {_KVM_API_VERSION}"
        os.close(fcntl.ioctl(device, _KVM_CREATE_VM, 0))
    except OSError as error:
        return f"{DEVICE} creates no VM: {error.strerror}"
    finally:
        os.close(device)
    return ""


def kvm_cpu_fault() -> str:
    """Why this CPU cannot virtualise, "" if it says that it can (x86 only; others don't say)."""
    if host_arch() != "x86_64":
        return ""
    try:
        text = CPUINFO.read_text()
    except OSError:
        return ""
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}
    return "" if flags & {"vmx", "svm"} else f"the CPU shows neither vmx nor svm, though {DEVICE} answers"


def remembered_fault() -> str:
    """What an earlier start found out about KVM on this very host, "" if nothing bad."""
    try:
        verdict = read_json(_memory()) or {}
    except Unreadable:
        return ""
    if verdict.get("host") != _host() or not isinstance(verdict.get("kvm_fault"), str):
        return ""
    return f"{verdict['kvm_fault']} (remembered in {_memory()}; hostos doctor tries it again)"


def remember_fault(fault: str) -> None:
    """Keep the next starts from trying KVM again; "" forgets. Never fails: it is only a cache."""
    try:
        if not fault:
            _memory().unlink(missing_ok=True)
            return
        private_dir(cache_dir())
        write_json(_memory(), {"host": _host(), "kvm_fault": fault, "at": time.time()})
    except (OSError, UserError):
        pass


def _memory() -> Path:
    return cache_dir() / "accelerator.json"


def _host() -> dict[str, str]:
    """What a verdict holds for: if any of it changes, the accelerator is tried again."""
    return {"boot": _boot_id(), "kernel": platform.release(), "qemu": _qemu(), "cpu": _cpu()}


def _boot_id() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _qemu() -> str:
    """The installed QEMU, told apart from another version without running it."""
    found = shutil.which(f"qemu-system-{host_arch()}")
    if not found:
        return ""
    try:
        status = Path(found).stat()
    except OSError:
        return found
    return f"{found} {status.st_size} {status.st_mtime_ns}"


def _cpu() -> str:
    """Model and flags of the CPU, as a digest."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    facts = sorted({line for line in lines if line.startswith(("model name", "flags", "microcode", "Features"))})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
