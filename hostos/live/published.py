"""Ports of a container with a network of its own, published on the machine (`--publish`).

Nothing is routed to a container. Instead the daemon listens, and carries each connection into the container's
network by a socket that was made in there: so nobody else can reach it, and it reaches nobody more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from hostos.errors import UserError, failure
from hostos.live import syscalls

CHUNK = 65536
CONNECT_LIMIT = 10.0
"""Seconds for reaching the container's port."""


@dataclass(frozen=True)
class Port:
    """`listen` on the machine (0: any that is free) leads to `inside` in the container. TCP."""

    listen: int
    inside: int


def parse_port(text: str) -> Port:
    """`LISTEN:INSIDE`. Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", text)
    if not match or int(match[1]) > 65535 or not 0 < int(match[2]) <= 65535:
        raise UserError(f"not a port to publish: {text[:40]!r}", "write LISTEN:INSIDE")
    return Port(int(match[1]), int(match[2]))


async def serve(nursery: trio.Nursery, port: Port, namespace: Path, address: str) -> tuple[Port, trio.CancelScope]:
    """Listen until the scope that is returned is cancelled; with it the number that is listened on.

    `namespace`: the file of the container's network; `address`: the container's in there. Raises a failure
    if the port is taken.
    """
    try:
        listeners = await trio.open_tcp_listeners(port.listen, host="0.0.0.0")
    except OSError as error:
        raise failure(f"port {port.listen} of the machine: {error.strerror}", "publish another") from None
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            await trio.serve_listeners(partial(_carry, namespace, address, port.inside), listeners)

    nursery.start_soon(run)
    return Port(int(listeners[0].socket.getsockname()[1]), port.inside), scope


async def _carry(namespace: Path, address: str, port: int, outer: trio.SocketStream) -> None:
    async with outer:
        try:
            inside = await trio.to_thread.run_sync(syscalls.tcp_socket_in, namespace)
            socket = trio.socket.from_stdlib_socket(inside)
            with trio.fail_after(CONNECT_LIMIT):
                await socket.connect((address, port))
        except (OSError, trio.TooSlowError):
            return  # nobody listens in there: closed, as if nobody listened here
        async with trio.SocketStream(socket) as inner, trio.open_nursery() as both:
            both.start_soon(_copy, outer, inner)
            both.start_soon(_copy, inner, outer)


async def _copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
    try:
        while data := await source.receive_some(CHUNK):
            await target.send_all(data)
        await target.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        # One side has gone: so shall the other.
        await trio.aclose_forcefully(source)
        await trio.aclose_forcefully(target)
