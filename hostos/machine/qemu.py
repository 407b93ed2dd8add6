"""QEMU's command line, from a description of the machine."""

from __future__ import annotations

import platform
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError
from hostos.machine import disk, share
from hostos.machine.accel import Name
from hostos.machine.disk import Disk
from hostos.machine.network import USER, Forward, Net
from hostos.machine.share import Share

_PACKAGES = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}


@dataclass(frozen=True)
class Ram:
    """The guest's memory as a file: what it writes goes there, or (`private`) nowhere."""

    file: Path
    private: bool


@dataclass(frozen=True)
class Config:
    """Everything the command line depends on. Paths are absolute; memory in MiB.

    `incoming`: nothing is booted, a saved machine is to be loaded over the monitor. It is waited for
    somebody who listens to the guest, so that the guest sees its port connected from the beginning.
    """

    binary: Path
    name: str
    arch: str
    accelerator: Name
    cpus: int
    memory_mib: int
    kernel: Path
    initrd: Path
    cmdline: str
    mac: str
    forwards: tuple[Forward, ...]
    serial_log: Path
    console_socket: Path
    monitor_socket: Path
    agent_socket: Path
    pid_file: Path
    net: Net = USER
    # The tap that QEMU makes on a bridge, or is to use; with `bridge_helper` that makes one itself.
    tap: str = ""
    bridge_helper: Path | None = None
    # Whose Ethernet frames it exchanges with vmnet; without it QEMU does so itself, as root.
    vmnet_daemon: Path | None = None
    ram: Ram | None = None
    incoming: bool = False
    disk: Disk | None = None
    shares: tuple[Share, ...] = ()
    # Memory the guest has freed is given back to the host.
    reclaim: bool = False


def find_qemu(arch: str) -> Path:
    """The QEMU that runs guests of `arch`; raises UserError saying how to install it."""
    name = f"qemu-system-{arch}"
    found = shutil.which(name)
    if found:
        return Path(found)
    if platform.system() == "Darwin":
        how = "brew install qemu"
    elif shutil.which("apt-get"):
        how = f"apt-get install {_PACKAGES.get(arch, 'qemu-system')}"
    elif shutil.which("dnf"):
        how = f"dnf install {name}-core"
    elif shutil.which("pacman"):
        how = f"pacman -S {name}"
    else:
        how = "install QEMU 7.2 or newer"
    raise UserError(f"{name} is not installed (or not in PATH)", how)


def command(config: Config) -> list[str]:
    """The command line that starts `config`.

    No defaults of QEMU's are relied upon: each device is named, in a fixed order, so that the same
    configuration is the same hardware to the guest.
    """
    accel = "tcg,thread=multi" if config.accelerator == "tcg" else config.accelerator
    options: list[list[str]] = [
        ["-name", _escape(f"hostos-{config.name}")],
        ["-nodefaults"],
        ["-no-user-config"],
        ["-display", "none"],
        *_memory(config),
        ["-accel", accel],
        ["-cpu", cpu_model(config.arch, config.accelerator)],
        ["-smp", str(config.cpus)],
        *_boot(config),
        ["-netdev", _netdev(config)],
        # No option ROM: nothing boots from the network.
        ["-device", f"virtio-net-pci,netdev=net0,mac={config.mac},romfile="],
        ["-object", "rng-builtin,id=rng0"],
        ["-device", "virtio-rng-pci,rng=rng0"],
        ["-chardev", _listen("agent", config.agent_socket, wait=config.incoming)],
        ["-device", "virtio-serial-pci"],
        ["-device", "virtserialport,chardev=agent,name=hostos.agent"],
        # The log is written whether or not somebody is connected to the console.
        ["-chardev", f"{_listen('console', config.console_socket)},logfile={_escape(config.serial_log)}"],
        ["-serial", "chardev:console"],
        ["-chardev", _listen("monitor", config.monitor_socket)],
        ["-mon", "chardev=monitor,mode=control"],
        ["-pidfile", str(config.pid_file)],
    ]
    if has_generation_id(config.arch):
        # Tells a restored or cloned guest that it is one, so that it reseeds its random numbers.
        options.append(["-device", "vmgenid,guid=auto"])
    # After everything else, so that without them the hardware is the same.
    if config.disk is not None:
        options += disk.options(config.disk)
    options += share.options(config.shares)
    if config.reclaim:
        options.append(["-device", "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on"])
    return [str(config.binary), *(word for option in options for word in option)]


def has_generation_id(arch: str) -> bool:
    """Whether QEMU's machine has the device "vmgenid", which ACPI describes."""
    return arch == "x86_64"


def machine_type(arch: str, accelerator: Name) -> str:
    """QEMU's machine. The interrupt controller of `virt` is named: its default, version 2, takes 8 CPUs at
    most. Emulated it is always version 3; a real CPU decides which ones there can be."""
    if arch == "x86_64":
        return "q35"
    return f"virt,gic-version={'3' if accelerator == 'tcg' else 'max'}"


def cpu_model(arch: str, accelerator: Name) -> str:
    """The CPU: the host's own, or all that QEMU can emulate."""
    if accelerator != "tcg":
        return "host"
    if arch == "x86_64":
        # A CPU with ERMS is one whose `rep movsb` is fast, so kernel and C library clear and copy pages with it:
        # emulated, that is a loop over single bytes.
        return "max,-erms"
    # Pointer authentication as the architecture describes it takes an emulator longer than all the rest:
    # it may be any function of the same inputs.
    return "max,pauth-impdef=on"


def shell_text(command: list[str]) -> str:
    """`command` for a terminal: one option a line, quoted for sh."""
    lines = [shlex.quote(command[0])]
    for word in command[1:]:
        if word.startswith("-"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return " \\\n  ".join(lines)


def _netdev(config: Config) -> str:
    match config.net.kind:
        case "user":
            return "user,id=net0" + "".join(f",hostfwd={forward.rule()}" for forward in config.forwards)
        case "vmnet" if config.vmnet_daemon:
            return f"stream,id=net0,server=off,addr.type=unix,addr.path={_escape(config.vmnet_daemon)}"
        case "vmnet":
            return "vmnet-shared,id=net0"
        case "bridge" if config.bridge_helper:
            return f"bridge,id=net0,br={config.net.name},helper={_escape(config.bridge_helper)}"
        case _:
            return f"tap,id=net0,ifname={config.tap},script=no,downscript=no"


def _memory(config: Config) -> list[list[str]]:
    machine, size = machine_type(config.arch, config.accelerator), f"{config.memory_mib}M"
    if config.ram is None:
        return [["-machine", machine], ["-m", size]]
    share = "off" if config.ram.private else "on"
    return [
        ["-object", f"memory-backend-file,id=ram,size={size},mem-path={_escape(config.ram.file)},share={share}"],
        ["-machine", f"{machine},memory-backend=ram"],
        ["-m", size],
    ]


def _boot(config: Config) -> list[list[str]]:
    if config.incoming:
        # Neither kernel nor firmware could boot it again.
        return [["-incoming", "defer"], ["-no-reboot"]]
    return [["-kernel", str(config.kernel)], ["-initrd", str(config.initrd)], ["-append", config.cmdline]]


def _listen(identifier: str, path: Path, *, wait: bool = False) -> str:
    return f"socket,id={identifier},path={_escape(path)},server=on,wait={'on' if wait else 'off'}"


def _escape(value: Path | str) -> str:
    """A value inside a comma-separated QEMU option."""
    return str(value).replace(",", ",,")
