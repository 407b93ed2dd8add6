"""Everything a start needs, looked at before a start (`hostos doctor`).

Each check is a generator of findings; none changes anything but what is known about accelerators.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hostos.errors import UserError
from hostos.findings import Finding, fault, ok, warning
from hostos.machine import accel, network, os_image, proof, qemu
from hostos.machine.instance import LONGEST_SOCKET_NAME, Instance, all_instances
from hostos.machine.leases import MAC_LEASES
from hostos.machine.options import DEFAULT_MEMORY_MIB, MAX_CPUS
from hostos.machine.os_image import OsImage
from hostos.paths import SOCKET_PATH_LIMIT, cache_dir, config_dir, data_dir, runtime_dir, state_dir

# The oldest QEMU the tests run with (Debian 12).
TESTED_QEMU = (7, 2)
# Without these no guest starts; without the others one option of `up` does not work.
NEEDED_DEVICES = ("virtio-net-pci", "virtio-rng-pci", "virtio-serial-pci", "virtserialport")
OPTIONAL_DEVICES = {
    "virtio-blk-pci": "--disk",
    "virtio-9p-pci": "--share",
    "virtio-balloon-pci": "giving memory back",
    "vmgenid": "new random numbers after a restore",
}
# The instance's own initrd, logs, and room to breathe.
NEEDED_DISK_MIB = 200
_ASK_SECONDS = 20.0


def findings(os_directory: Path | None, *, prove: bool = True) -> Iterator[Finding]:
    """All checks of machines, in the order in which a start would come across them.

    `prove`: start a throw-away guest under each accelerator there is (a second, at most
    `proof.PROOF_SECONDS` each), and remember for `hostos up` what came of it.
    """
    image, found = _os(os_directory)
    arch = image.arch if image else os_image.host_arch()
    try:
        binary: Path | None = qemu.find_qemu(arch)
    except UserError as error:
        binary = None
        yield fault("QEMU", error.message, error.hint)
    if binary:
        yield from check_qemu(binary, arch)
        yield from check_accelerators(binary, arch, image, prove=prove)
    yield found
    yield from check_memory(image)
    yield from check_directories()
    yield from check_sockets()
    yield from check_disk()
    yield from check_ports()
    yield from check_ssh()
    yield from check_leases()
    yield from check_machines()


def check_qemu(binary: Path, arch: str) -> Iterator[Finding]:
    try:
        banner = _ask(binary, "--version")
        devices = set(re.findall(r'^name "([^"]+)"', _ask(binary, "-machine", "none", "-device", "help"), re.M))
        backends = _ask(binary, "-machine", "none", "-netdev", "help").split()
    except (OSError, subprocess.SubprocessError) as error:
        yield fault("QEMU", f"{binary} does not run: {error}", "install it anew, or put another first in PATH")
        return
    match = re.search(r"version (\d+)\.(\d+)[.\d]*", banner)
    text = f"{match[0].removeprefix('version ')} ({binary})" if match else f"{banner.splitlines()[0]} ({binary})"
    if match and (int(match[1]), int(match[2])) < TESTED_QEMU:
        tested = ".".join(map(str, TESTED_QEMU))
        yield warning("QEMU", f"{text} is older than what hostos is tested with", f"QEMU {tested} or newer")
    else:
        yield ok("QEMU", text)
    missing = [name for name in NEEDED_DEVICES if name not in devices]
    if "user" not in backends:
        missing.append("user networking (slirp)")
    if missing:
        fix = "use your distribution's full QEMU package, or configure it with --enable-slirp and its default devices"
        yield fault("QEMU devices", f"it lacks {', '.join(missing)}", fix)
        return
    without = {
        name: what
        for name, what in OPTIONAL_DEVICES.items()
        if name not in devices and not (name == "vmgenid" and not qemu.has_generation_id(arch))
    }
    if without:
        lost = "; ".join(f"{what} (no {name})" for name, what in without.items())
        yield warning("QEMU devices", f"what a start needs is there, but not: {lost}", "use a fuller QEMU package")
    else:
        yield ok("QEMU devices", "all that is used is there, and user networking")


def check_accelerators(binary: Path, arch: str, image: OsImage | None, *, prove: bool) -> Iterator[Finding]:
    """Whether guests really execute: what a device node or a flag promises is not believed."""
    kernel = image.kernel("kvm") if image else None
    native = arch == os_image.host_arch()
    if platform.system() == "Linux":
        yield from _check_kvm(binary, arch, kernel, native, prove=prove)
    elif platform.system() == "Darwin" and native:
        yield from _check("hvf", binary, arch, kernel, prove=prove)
    yield from _check("tcg", binary, arch, kernel, prove=prove)


def _check_kvm(binary: Path, arch: str, kernel: Path | None, native: bool, *, prove: bool) -> Iterator[Finding]:
    slower = f"guests run under TCG, {accel.SLOWDOWN}"
    if not native:
        yield warning("KVM", f"cannot run {arch} guests on this {os_image.host_arch()} host; {slower}", _OTHER_HOST)
        return
    reason = accel.kvm_device_fault()
    if reason:
        yield warning("KVM", f"{reason}; {slower}", _kvm_fix())
        return
    doubt = accel.kvm_cpu_fault()
    if not prove:
        reason = doubt or accel.remembered_fault()
        yield warning("KVM", f"{reason}; {slower}", _OTHER_HOST) if reason else ok("KVM", "promised, not tried")
        return
    reason = proof.prove("kvm", binary, arch, kernel)
    accel.remember_fault(f"it creates a VM whose guest never runs ({reason})" if reason else "")
    if reason:
        lies = f"{accel.DEVICE} opens and creates a VM, but no guest runs: {reason}"
        yield warning("KVM", f"{lies}{f' ({doubt})' if doubt else ''}; {slower}", _OTHER_HOST)
    elif doubt:
        yield warning("KVM", f"works, but {doubt}, so --accel auto does not take it", "hostos up --accel kvm")
    else:
        yield ok("KVM", "proven: a guest ran")


def _check(name: accel.Name, binary: Path, arch: str, kernel: Path | None, *, prove: bool) -> Iterator[Finding]:
    title = name.upper()
    if not prove:
        yield ok(title, "not tried")
        return
    try:
        reason = proof.prove(name, binary, arch, kernel)
    except UserError as error:
        yield warning(title, f"not proven: {error.message}", error.hint)
        return
    if not reason:
        yield ok(title, "proven: a guest ran")
    elif name == "tcg":
        yield fault(title, f"no guest runs by emulation: {reason}", "install another QEMU; this one is broken")
    else:
        yield warning(title, f"no guest runs: {reason}", "guests run under TCG; codesign QEMU with the entitlement")


_OTHER_HOST = "a host with hardware virtualisation (in a VM: nested virtualisation) makes guests faster"


def _kvm_fix() -> str:
    if not accel.DEVICE.exists():
        module = "kvm_amd or kvm_intel" if os_image.host_arch() == "x86_64" else "kvm"
        return f"enable virtualisation in the firmware and load {module}: modprobe kvm"
    if not os.access(accel.DEVICE, os.R_OK | os.W_OK):
        return "sudo usermod -aG kvm $USER, then log in again"
    return _OTHER_HOST


def _os(directory: Path | None) -> tuple[OsImage | None, Finding]:
    try:
        image = os_image.find(directory)
        os_image.verify(image)
    except UserError as error:
        return None, fault("OS", error.message, error.hint)
    text = f"{image.directory}: {image.profile} for {image.arch}, Linux {image.kernel_version}, checksums right"
    return image, ok("OS", text)


def check_memory(image: OsImage | None) -> Iterator[Finding]:
    import psutil

    available = psutil.virtual_memory().available >> 20
    cpus = os.cpu_count() or 1
    text = f"{available} MiB available, {min(cpus, MAX_CPUS)} CPUs"
    if image and available < image.min_memory_mib:
        yield fault("memory", f"{text}; this OS needs {image.min_memory_mib} MiB", "end other programs")
    elif available < DEFAULT_MEMORY_MIB:
        yield warning("memory", f"{text}; a machine takes {DEFAULT_MEMORY_MIB} MiB", "hostos up --memory MIB")
    else:
        yield ok("memory", text)


def check_directories() -> Iterator[Finding]:
    """Whether what hostos keeps can be written. Nothing is made: the nearest existing parent counts."""
    faults: dict[str, list[str]] = {}
    for what, path in {
        "state": state_dir(),
        "data": data_dir(),
        "cache": cache_dir(),
        "config": config_dir(),
        "runtime": runtime_dir(),
    }.items():
        existing = nearest(path)
        if not existing.is_dir():
            faults.setdefault(f"{existing} is no directory", []).append(what)
        elif path.is_dir() and path.stat().st_uid != os.getuid():
            faults.setdefault(f"{path} belongs to somebody else (uid {path.stat().st_uid})", []).append(what)
        elif not _writable(existing):
            faults.setdefault(f"{existing} cannot be written", []).append(what)
    for reason, whats in faults.items():
        fix = "chown or chmod it, or choose another place: HOSTOS_HOME=<directory>"
        yield fault("directories", f"{reason} (for {', '.join(whats)})", fix)
    if not faults:
        yield ok("directories", f"{state_dir()} and the others can be written")


def nearest(path: Path) -> Path:
    """`path` or the first of its parents that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def _writable(directory: Path) -> bool:
    """A file made and removed again says more than mode bits: read-only file systems, root."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".hostos-doctor-"):
            return True
    except OSError:
        return False


def check_sockets() -> Iterator[Finding]:
    longest = len(os.fsencode(Instance.named("x" * LONGEST_SOCKET_NAME).monitor_socket))
    text = f"{runtime_dir()}: paths of at most {longest} of {SOCKET_PATH_LIMIT} bytes"
    if longest > SOCKET_PATH_LIMIT:
        yield fault("sockets", f"{text} are too long", "a shorter TMPDIR or XDG_RUNTIME_DIR")
    else:
        yield ok("sockets", text)


def check_disk() -> Iterator[Finding]:
    place = nearest(state_dir())
    free = shutil.disk_usage(place).free >> 20
    text = f"{free} MiB free in {place}"
    if free < NEEDED_DISK_MIB:
        yield fault("disk", f"{text}; a start needs about {NEEDED_DISK_MIB} MiB", "make room, or HOSTOS_HOME elsewhere")
    else:
        yield ok("disk", text)


def check_ports() -> Iterator[Finding]:
    """Loopback carries SSH: a socket is bound, connected to, and closed again."""
    import socket

    try:
        port = network.choose_port("tcp", "udp")
        with socket.create_server((network.LOOPBACK, port)) as server:
            with socket.create_connection((network.LOOPBACK, port), timeout=3.0):
                server.settimeout(3.0)
                server.accept()[0].close()
    except (OSError, UserError) as error:
        yield fault("ports", f"{network.LOOPBACK} does not work: {error}", "ip link set lo up; see firewall rules")
    else:
        yield ok("ports", f"{network.LOOPBACK} takes connections, e.g. on port {port}")


def check_ssh() -> Iterator[Finding]:
    missing = [name for name in ("ssh", "scp", "ssh-keygen") if not shutil.which(name)]
    if missing:
        how = "brew install openssh" if platform.system() == "Darwin" else "install the OpenSSH client (openssh-client)"
        says = f"{', '.join(missing)} not found: no hostos ssh and cp (hostos run and containers work)"
        yield warning("ssh", says, how)
    else:
        said = subprocess.run(["ssh", "-V"], capture_output=True, text=True, timeout=_ASK_SECONDS, check=False)
        yield ok("ssh", (said.stderr.strip() or said.stdout.strip()).split(",")[0])


def check_leases() -> Iterator[Finding]:
    """macOS only: vmnet's DHCP server tells addresses in a file."""
    if platform.system() != "Darwin":
        return
    try:
        size = MAC_LEASES.stat().st_size
        MAC_LEASES.open("rb").close()
    except FileNotFoundError:
        yield ok("leases", f"{MAC_LEASES} is not there yet; the first machine with --net vmnet makes it")
    except OSError as error:
        yield warning("leases", f"{MAC_LEASES}: {error.strerror}; --net vmnet finds no address", "sudo chmod a+r it")
    else:
        yield ok("leases", f"{MAC_LEASES}, {size} bytes")


def check_machines() -> Iterator[Finding]:
    """Machines that need somebody; the others need no line each."""
    states: dict[str, int] = {}
    for instance in all_instances():
        state, reason = instance.state()
        states[state] = states.get(state, 0) + 1
        option = "" if instance.name == "default" else f" -m {instance.name}"
        if state == "broken":
            yield warning(f"machine {instance.name}", f"{state}: {reason}", f"hostos up{option} starts it afresh")
        elif state == "unresponsive":
            yield warning(f"machine {instance.name}", f"{state}: {reason}", f"wait, or hostos kill{option}")
        elif state == "interrupted":
            yield warning(f"machine {instance.name}", f"{state}: {reason}", f"hostos up{option}, or kill{option}")
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    yield ok("machines", counted or "none yet")


def _ask(binary: Path, *words: str) -> str:
    done = subprocess.run(
        [binary, *words], capture_output=True, text=True, timeout=_ASK_SECONDS, check=True, stdin=subprocess.DEVNULL
    )
    return done.stdout
