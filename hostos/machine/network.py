"""How a machine is connected, what the guest sees, and ports of the host that lead into it."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import platform
import random
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hostos.errors import UserError
from hostos.hostsystem import who_listens

LOOPBACK = "127.0.0.1"
# QEMU's built-in network (slirp), its defaults.
HOST_FROM_GUEST = "10.0.2.2"
GUEST_ADDRESS = "10.0.2.15"
SSH_PORT = 22
SWARM_PORT = 6881
# Below the range from which Linux (32768) and macOS (49152) give ports to outgoing connections: one
# that is free now is not taken by chance a moment later, nor are all taken on a busy host.
_OWN_PORTS = range(20000, 32768)

Protocol = Literal["tcp", "udp"]
Kind = Literal["user", "bridge", "tap", "vmnet"]
# IFNAMSIZ with its NUL; what else Linux refuses in the name of an interface.
_INTERFACE = re.compile(r"(?!\.{1,2}$)[^\s/:,=]{1,15}")
# Where socket_vmnet (https://github.com/lima-vm/socket_vmnet) listens: Homebrew's on Apple silicon, on Intel,
# and as installed from source.
VMNET_DAEMONS = (
    Path("/opt/homebrew/var/run/socket_vmnet"),
    Path("/usr/local/var/run/socket_vmnet"),
    Path("/var/run/socket_vmnet"),
)
_PUBLISH = re.compile(r"(?:([0-9.]+):)?([0-9]{1,5}):([0-9]{1,5})(?:/(tcp|udp))?")


@dataclass(frozen=True)
class Net:
    """How a machine is connected: through QEMU's built-in network, on the bridge `name`, with the tap
    interface `name` that somebody made, or with macOS's vmnet."""

    kind: Kind = "user"
    name: str = ""

    @property
    def own_address(self) -> bool:
        """Whether a DHCP server gives the guest an address at which this host reaches it directly."""
        return self.kind != "user"

    def __str__(self) -> str:
        return f"{self.kind}={self.name}" if self.name else self.kind


USER = Net()


def parse_net(text: str) -> Net:
    """`user`, `bridge=BR`, `tap=NAME` or `vmnet`. Raises UserError."""
    kind, equals, name = text.partition("=")
    if text in ("user", "vmnet"):
        return Net("user" if text == "user" else "vmnet")
    if kind in ("bridge", "tap") and equals and _INTERFACE.fullmatch(name):
        return Net("bridge" if kind == "bridge" else "tap", name)
    raise UserError(f"--net {text!r} is not understood", "user, bridge=NAME (e.g. bridge=virbr0), tap=NAME or vmnet")


def check_vmnet() -> Path | None:
    """The socket of the daemon that gives this process vmnet, None if it may use it itself, being root.

    Raises UserError if this is no macOS, or neither is so.
    """
    if platform.system() != "Darwin":
        raise UserError("vmnet is macOS's", "on Linux: --net bridge=NAME; anywhere: --net user")
    if os.geteuid() == 0:
        return None
    daemon = next((path for path in VMNET_DAEMONS if os.access(path, os.R_OK | os.W_OK)), None)
    if daemon is None:
        raise UserError(
            "vmnet needs root: macOS gives it to nobody else without Apple's signature",
            "let a daemon have it (brew install socket_vmnet; sudo brew services start socket_vmnet), "
            "or sudo hostos up, or --net user, which needs neither",
        )
    return daemon


@dataclass(frozen=True)
class Forward:
    """`address:host_port` on the host leads to `guest_port` in the guest."""

    host_port: int
    guest_port: int
    protocol: Protocol = "tcp"
    address: str = LOOPBACK

    def rule(self) -> str:
        """As QEMU's `-netdev user,hostfwd=` takes it."""
        return f"{self.protocol}:{self.address}:{self.host_port}-:{self.guest_port}"

    def __str__(self) -> str:
        return f"{self.address}:{self.host_port}:{self.guest_port}/{self.protocol}"


def parse_publish(text: str) -> Forward:
    """`[ADDR:]HOST:GUEST[/udp]`, e.g. `8080:80`; on 127.0.0.1 unless ADDR says otherwise.

    Raises UserError.
    """
    hint = "write --publish HOST:GUEST, e.g. --publish 8080:80, or ADDR:HOST:GUEST[/udp]"
    match = _PUBLISH.fullmatch(text)
    if not match:
        raise UserError(f"--publish {text!r} is not understood", hint)
    address, host, guest, protocol = match.groups()
    try:
        address = str(ipaddress.IPv4Address(address)) if address else LOOPBACK
    except ValueError:
        raise UserError(f"--publish {text!r}: {address!r} is not an IPv4 address", hint) from None
    for port in (int(host), int(guest)):
        if not 1 <= port <= 65535:
            raise UserError(f"--publish {text!r}: port {port} is not between 1 and 65535", hint)
    return Forward(int(host), int(guest), "udp" if protocol == "udp" else "tcp", address)


def is_free(port: int, protocol: Protocol = "tcp", address: str = LOOPBACK) -> bool:
    """Whether `port` can be bound now (another process may take it right after)."""
    return _bind(port, protocol, address) is not None


def address_towards(address: str) -> str:
    """The address this host has for `address`, "" if there is no way to it. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return ""
        own: str = probe.getsockname()[0]
        return own


def choose_port(*protocols: Protocol, preferred: int | None = None, but_not: frozenset[int] = frozenset()) -> int:
    """A loopback port that is free for all `protocols`: `preferred` if possible.

    Raises UserError when none is found.
    """
    candidates = [preferred] if preferred else []
    candidates += random.sample(_OWN_PORTS, 200)
    # As the last resort whatever the system hands out.
    candidates += [_bind(0, protocols[0], LOOPBACK) or 0 for _ in range(5)]
    for port in candidates:
        if port and port not in but_not and all(is_free(port, protocol) for protocol in protocols):
            return port
    raise UserError("no free port was found on 127.0.0.1", f"see who holds them: {who_listens()}")


def _bind(port: int, protocol: Protocol, address: str) -> int | None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        if protocol == "tcp":
            # As QEMU binds: connections that are closing down do not block the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return None
        bound: int = probe.getsockname()[1]
        return bound


def host_identity() -> str:
    """Something no other host has: machines of the same name on two hosts may meet on one network."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        import uuid

        return str(uuid.getnode())


def mac_address(identity: str) -> str:
    """The network address of the machine `identity`: always the same, in QEMU's range."""
    tail = hashlib.sha256(identity.encode()).digest()[:3]
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in tail)
