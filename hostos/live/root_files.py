"""What an image is given so that it can be this machine's system: who it is, who may log in, and that its network
is up already. Everything goes into the overlay's upper layer or below /run; the image itself is never changed.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from hostos.live import syscalls
from hostos.live.inside import Inside

INSTANCE = Path("/etc/hostos/instance")
"""What the launcher appended to the initrd (docs/guest.md), here, in the initial file system."""

INITS = ("sbin/init", "usr/lib/systemd/systemd", "lib/systemd/systemd", "usr/sbin/init", "etc/init", "bin/init")
"""Where the kernel looks for an init, and systemd-nspawn."""
SSH_SERVERS = ("usr/sbin/sshd", "usr/sbin/dropbear", "usr/bin/dropbear", "usr/sbin/tinysshd", "usr/local/sbin/sshd")

HOST_KEYS = ("rsa", "ecdsa", "dsa")
_HOST_KEY = "etc/ssh/ssh_host_{}_key"
_KEYS = tuple(_HOST_KEY.format(kind) + end for kind in ("ed25519", *HOST_KEYS) for end in ("", ".pub"))
GIVEN = (
    *("etc/hostname", "etc/hosts", "etc/machine-id", "etc/resolv.conf", "root/.ssh/authorized_keys", *_KEYS),
    # What its init makes for it alone (systemd-random-seed(8), systemd-creds(1)).
    *("var/lib/dbus/machine-id", "var/lib/systemd/random-seed", "var/lib/systemd/credential.secret"),
)
"""What is this machine's own in its root, and no part of an image that is made of that."""


def is_given(path: bytes) -> bool:
    """Whether what is there is the machine's own, or would not be there in a container."""
    return os.fsdecode(path) in GIVEN or path.startswith((b"tmp/", b"run/", b"dev/"))


def identify(root: Inside, here: Path = Path("/"), *, kept: bool = False) -> None:
    """Host name, machine ID, host key and authorized keys, as the initial file system `here` has them.

    `kept`: these are changes of an earlier run, whose other host keys are its own. Raises OSError.
    """
    name = _line(here / "etc/hostname")
    if name:
        root.write("etc/hostname", f"{name}\n")
        hosts = root.read("etc/hosts").decode(errors="replace")
        if f"127.0.1.1 {name}\n" not in hosts:
            lines = [line for line in hosts.splitlines() if not line.startswith("127.0.1.1")]
            root.write("etc/hosts", "\n".join([*lines, f"127.0.1.1 {name}"]) + "\n")
    public = _line(here / INSTANCE.relative_to("/") / "ssh_host_ed25519_key.pub")
    private = here / INSTANCE.relative_to("/") / "ssh_host_ed25519_key"
    # Not the image's, which all its machines would have in common; and the same at each boot of this one.
    root.write("etc/machine-id", hashlib.sha256(f"hostos machine of {public}".encode()).hexdigest()[:32] + "\n", 0o444)
    root.write(_HOST_KEY.format("ed25519"), private.read_bytes(), 0o600)
    root.write(_HOST_KEY.format("ed25519") + ".pub", f"{public}\n")
    if not kept:
        # Whoever has the image knows these.
        for kind in HOST_KEYS:
            root.remove(_HOST_KEY.format(kind))
            root.remove(_HOST_KEY.format(kind) + ".pub")
    keys = _text(here / "root/.ssh/authorized_keys").splitlines()
    before = root.read("root/.ssh/authorized_keys").decode(errors="surrogateescape").splitlines()
    lines = [*before, *(key for key in keys if key not in before)]
    if lines:
        os.close(root.directory("root/.ssh", 0o700))
        text = "".join(f"{line}\n" for line in lines)
        root.write("root/.ssh/authorized_keys", text.encode(errors="surrogateescape"), 0o600)


def up_to_date(root: Inside) -> None:
    """Tell systemd that /etc and /var fit /usr (systemd-update-done.service(8)): they came together. Raises OSError.

    Or it would look after them at each boot: `ldconfig` reads a part of every library there is. Only where there is a
    linker's cache, so that a package manager did all that (`hostos.live.running.NO_UPDATE`): an image may leave it to
    systemd to fill an empty /etc.
    """
    if not root.read("etc/ld.so.cache"):
        return
    changed = root.changed("usr")
    for directory in ("etc", "var"):
        if changed and root.changed(f"{directory}/.updated") < changed:
            root.write(f"{directory}/.updated", f"TIMESTAMP_NSEC={changed}\n", changed=changed)


def keep_network(root: Inside, interface: str, servers: list[str]) -> None:
    """Tell whatever manages networks in there that `interface` is up and looked after. Raises OSError.

    What it would change cuts off its own root. `root`'s /run must be there already.
    """
    names = " ".join(servers)
    root.write(
        "run/systemd/network/00-hostos.network",
        f"[Match]\nName={interface}\n\n[Network]\nKeepConfiguration=yes\n"
        + "".join(f"DNS={server}\n" for server in servers),
    )
    # It is in use: udev must not rename it.
    root.write(
        "run/systemd/network/00-hostos.link",
        f"[Match]\nOriginalName={interface}\n\n[Link]\nNamePolicy=keep kernel\nMACAddressPolicy=none\n",
    )
    root.write("run/systemd/resolved.conf.d/hostos.conf", f"[Resolve]\nDNS={names}\n")
    root.write(
        "run/NetworkManager/conf.d/00-hostos.conf",
        f"[device-hostos]\nmatch-device=interface-name:{interface}\nmanaged=0\n",
    )
    # ifupdown: up already, and not to be taken down. One file for each card; older ones have one for all.
    root.write(f"run/network/ifstate.{interface}", f"{interface}\n")
    root.write("run/network/ifstate", f"{interface}={interface}\n")
    root.write("run/systemd/system/networking.service.d/hostos.conf", "[Service]\nExecStop=\n")
    # Not where a resolver of its own answers.
    if "systemd/resolve" not in root.target("etc/resolv.conf"):
        root.link("etc/resolv.conf", "/run/hostos/resolv.conf")


def give_console(root: Inside, active: str) -> None:
    """A login on the console also where there is no udev. `active`: as /sys/class/tty/console/active. Raises OSError.

    systemd starts a serial-getty for a serial console once udev has announced it: without udev never, and it waits
    for 90 s. console-getty.service(8) is for that.
    """
    if root.program("usr/lib/systemd/systemd-udevd", "lib/systemd/systemd-udevd"):
        return
    units = "run/systemd/system"
    for console in active.split():
        if not re.fullmatch(r"tty[0-9]*", console):
            root.link(f"{units}/serial-getty@{console}.service", "/dev/null")
    root.link(f"{units}/getty.target.wants/console-getty.service", "/usr/lib/systemd/system/console-getty.service")


def mount_shares(root: Inside, devices: str) -> None:
    """The shares among the lines of `devices` (overlay/usr/lib/hostos/devices). Raises OSError."""
    for line in devices.splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "9p":
            tag, how, path = rest.split(" ", 2)
            options = "trans=virtio,version=9p2000.L,msize=524288,cache=mmap"
            root.mount(path.lstrip("/"), "9p", tag, syscalls.MS_RDONLY if how == "ro" else 0, options)


def mount_kernel_file_systems(root: Inside) -> None:
    """What an init that is no systemd expects to find; and this system's /run, through which it is asked
    (docs/root.md). Raises OSError."""
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    root.mount("proc", "proc", "proc", flags)
    root.mount("sys", "sysfs", "sysfs", flags)
    root.mount("dev", "devtmpfs", "devtmpfs", syscalls.MS_NOSUID, "mode=755")
    root.mount("run", "", "/run")
    if not Path("/proc/modules").exists():
        # Everything is built into this kernel: what the image wants loaded cannot be, and is there or not.
        root.link("run/systemd/system/systemd-modules-load.service", "/dev/null")


def _line(path: Path) -> str:
    return _text(path).partition("\n")[0].strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""
