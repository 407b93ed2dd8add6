"""A network of its own for a container (`--network nat`): it can connect out, under the machine's address.

    container: host0 10.88.a.b/30 ── hcN (machine) ── forwarded, masqueraded (`nat`) ── the machine's network

The network namespace belongs to the machine, so the container can change nothing about it. Its routes keep it
from the machine itself, from other containers, and from the host, whose loopback user networking would show it.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

from hostos.live import nat, netlink, syscalls
from hostos.live.rtnetlink import LOOPBACK, PROTOCOL, Batch, gateways, own_addresses

MOST = 1 << 14
"""Networks of four addresses in 10.88.0.0/16."""
_MS_BIND = 4096
_INNER = "host0"
"""What systemd's network manager in a container expects."""
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def addresses(number: int) -> tuple[str, str]:
    """The machine's and the container's, of network `number`."""
    first = number * 4
    return f"10.88.{first >> 8}.{first & 255 | 1}", f"10.88.{first >> 8}.{first & 255 | 2}"


def make(stack: ExitStack, number: int, file: Path) -> Path:
    """Network `number`; its namespace is bound to `file`, which is returned. What must be undone goes onto
    `stack`. Raises OSError."""
    here, there = addresses(number)
    nat.masquerade()
    _FORWARD.write_text("1\n")
    file.touch()
    stack.callback(lambda: file.unlink(missing_ok=True))
    outer = f"hc{number}"
    with syscalls.namespace(syscalls.CLONE_NEWNET, "network namespaces") as child, ExitStack() as used:
        syscalls.mount(f"/proc/{child}/ns/net", file, "", _MS_BIND, "")
        stack.callback(syscalls.unmount_patiently, file, 1.0)
        link = used.enter_context(netlink.open_socket(PROTOCOL))
        forbidden = ["10.88.0.0/16", *(f"{each}/32" for each in (here, *own_addresses(link), *gateways(link)))]
        with suppress(OSError):
            Batch().delete(outer).apply(link)  # left by a daemon that was killed
        namespace = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        used.callback(os.close, namespace)
        Batch().veth(outer, _INNER, namespace).apply(link)
        stack.callback(_remove, outer)
        index = socket.if_nametoindex(outer)
        Batch().address(index, f"{here}/30").up(index).apply(link)
        with syscalls.inside(file):
            link = used.enter_context(netlink.open_socket(PROTOCOL))
            inner = socket.if_nametoindex(_INNER)
        inside = Batch().address(inner, f"{there}/30").up(LOOPBACK).up(inner).default_route(here, inner)
        for each in dict.fromkeys(forbidden):
            inside.unreachable(each)
        inside.apply(link)
    return file


def _remove(interface: str) -> None:
    with suppress(OSError), netlink.open_socket(PROTOCOL) as link:
        Batch().delete(interface).apply(link)
