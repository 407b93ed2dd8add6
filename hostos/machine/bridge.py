"""A machine on a bridge of this host (Linux): what is needed for it, its tap interface.

QEMU makes the tap itself and does not make it persistent: it disappears with QEMU, however that
ends, so nothing has to be cleaned up. The launcher only connects it to the bridge. Where it may not,
QEMU's own set-uid helper does both.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import socket
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

from hostos.errors import UserError, failure

SYS = Path("/sys/class/net")
TUN = Path("/dev/net/tun")
HELPER_NAME = "qemu-bridge-helper"
HELPERS = tuple(Path(place) / HELPER_NAME for place in ("/usr/lib/qemu", "/usr/libexec", "/usr/local/libexec"))
HELPER_RULES = Path("/etc/qemu/bridge.conf")
# How long QEMU may take to make its tap.
_TAP_SECONDS = 20.0

# linux/sockios.h, linux/if.h, linux/capability.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFHWADDR, _SIOCBRADDIF = 0x8913, 0x8914, 0x8924, 0x89A2
_IFF_UP = 0x1
_ARPHRD_ETHER = 1
_CAP_NET_ADMIN = 12


def check_bridge(name: str) -> None:
    """Raises UserError unless `name` is a bridge that is up."""
    _require_linux()
    if not (SYS / name).exists():
        there = bridges()
        raise UserError(
            f"there is no bridge {name!r}",
            f"bridges of this host: {', '.join(there)}" if there else f"make one: ip link add {name} up type bridge",
        )
    if not (SYS / name / "bridge").is_dir():
        above = (SYS / name / "master").resolve().name if (SYS / name / "master").exists() else ""
        raise UserError(
            f"{name!r} is not a bridge",
            f"it belongs to one: --net bridge={above}" if above else "bridges of this host: ip link show type bridge",
        )
    if not _flags(name) & _IFF_UP:
        raise UserError(f"bridge {name!r} is down", f"ip link set {name} up")


def check_tap(name: str) -> None:
    """Raises UserError unless `name` is a tap interface this user may use."""
    _require_linux()
    if not (SYS / name).exists():
        raise UserError(f"there is no interface {name!r}", f"make it: ip tuntap add {name} mode tap user $USER")
    try:
        flags = int((SYS / name / "tun_flags").read_text(), 16)
        owner = int((SYS / name / "owner").read_text())
    except (OSError, ValueError):
        raise UserError(f"{name!r} is not a tap interface", f"make one: ip tuntap add NAME mode tap; {name} is "
                        "something else") from None  # fmt: skip
    if not flags & 0x2:  # IFF_TAP; a tun has 0x1
        raise UserError(f"{name!r} is a tun interface, and a machine needs a tap", "ip tuntap add NAME mode tap")
    if owner not in (-1, os.getuid()) and not may_administer():
        raise UserError(f"tap {name!r} belongs to user {owner}", f"ip tuntap add {name} mode tap user $USER")


def bridges() -> list[str]:
    """The bridges of this host."""
    with contextlib.suppress(OSError):
        return sorted(path.name for path in SYS.iterdir() if (path / "bridge").is_dir())
    return []


def bridge_of(interface: str) -> str | None:
    """The bridge `interface` belongs to."""
    master = SYS / interface / "master"
    return master.resolve().name if master.exists() else None


def may_administer() -> bool:
    """Whether this process may make interfaces and connect them (CAP_NET_ADMIN)."""
    with contextlib.suppress(OSError):
        found = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.M)
        return bool(found and int(found[1], 16) >> _CAP_NET_ADMIN & 1) and os.access(TUN, os.R_OK | os.W_OK)
    return False


def find_helper(bridge: str) -> Path | None:
    """None if this process needs no help, else QEMU's helper. Raises UserError if it is not set up."""
    if may_administer():
        return None
    why = f"{bridge!r} can only be joined by root, or with QEMU's helper, which"
    helper = next((path for path in HELPERS if path.is_file()), None)
    if helper is None:
        raise UserError(f"{why} is not installed", "use sudo, or install it (Debian: qemu-system-common)")
    privileged = helper.stat().st_mode & stat.S_ISUID or "security.capability" in os.listxattr(helper)
    if not privileged:
        raise UserError(f"{why} has no privileges", f"sudo chmod u+s {helper}, or use sudo")
    if not _allowed(bridge):
        make = "" if HELPER_RULES.parent.is_dir() else f"sudo mkdir {HELPER_RULES.parent}; "
        raise UserError(
            f"{why} is not allowed to by {HELPER_RULES}", f"{make}echo 'allow {bridge}' | sudo tee -a {HELPER_RULES}"
        )
    if not os.access(TUN, os.R_OK | os.W_OK):
        # It gives up root's rights before it opens it.
        raise UserError(f"{why} may not open {TUN}", f"sudo chmod 666 {TUN} (as most systems have it), or use sudo")
    return helper


def _allowed(bridge: str) -> bool:
    """As qemu-bridge-helper reads its rules; a file that only it may read is left to it."""
    try:
        lines = [line.split() for line in HELPER_RULES.read_text().splitlines()]
    except FileNotFoundError:
        return False
    except OSError:
        return True
    rules = [words for words in lines if len(words) == 2]
    if ["deny", bridge] in rules or ["deny", "all"] in rules:
        return False
    return ["allow", bridge] in rules or ["allow", "all"] in rules or any(rule[0] == "include" for rule in rules)


def tap_name(identity: str) -> str:
    """The tap of the machine `identity`: always the same, at most 15 characters."""
    return f"hostos-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def connect(tap: str, bridge: str, mac: str, alive: Callable[[], bool]) -> None:
    """Connect the `tap` that QEMU is about to make to `bridge`, and set it up.

    `mac`: the guest's; the host's end gets the same below fe:, so that a bridge which takes the
    lowest address of its members keeps its own. Returns at once if QEMU ends, which others notice.
    Raises UserError (status 1).
    """
    give_up = time.monotonic() + _TAP_SECONDS
    while not (SYS / tap).exists():
        if not alive():
            return
        if time.monotonic() > give_up:
            raise failure(f"QEMU made no tap interface within {_TAP_SECONDS:g} s", "hostos logs --qemu")
        time.sleep(0.01)
    octets = bytes.fromhex("fe" + mac.replace(":", "")[2:])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _SIOCSIFHWADDR, struct.pack("16sH6s8x", tap.encode(), _ARPHRD_ETHER, octets))
            index = socket.if_nametoindex(tap)
            fcntl.ioctl(control, _SIOCBRADDIF, struct.pack("16si20x", bridge.encode(), index))
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", tap.encode(), _flags(tap) | _IFF_UP))
    except OSError as error:
        if not alive():
            return
        raise failure(f"{tap} cannot be connected to bridge {bridge!r}: {error.strerror}", "ip link show") from error


def _flags(interface: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            answer = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH22x", interface.encode(), 0))
        except OSError:
            return 0
    return int(struct.unpack_from("H", answer, 16)[0])


def _require_linux() -> None:
    if platform.system() != "Linux":
        raise UserError("bridges and taps are for Linux", "on macOS: --net vmnet; anywhere: --net user")
