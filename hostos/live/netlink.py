"""Requests to the kernel over netlink: how they are written and answered.

The guest's `ip` is a program to start for every change, tens of milliseconds each when emulated, and it
has no `nft`; a dozen messages do the same. rtnetlink(7), netlink(7), linux/netlink.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence

REQUEST, ACK, CREATE, APPEND, EXCL, DUMP = 1, 4, 0x400, 0x800, 0x200, 0x300
_ERROR, _DONE = 2, 3
_NESTED = 0x8000
_TIMEOUT = 5.0
"""Seconds: the kernel answers at once or not at all."""


def attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def nest(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(parts))


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in a message's body, behind its fixed part."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if not 4 <= length <= len(data):
            break
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def open_socket(protocol: int) -> socket.socket:
    """A socket to the kernel, in the network namespace of the calling thread. Raises OSError."""
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    link.bind((0, 0))
    link.settimeout(_TIMEOUT)
    return link


def request(link: socket.socket, messages: Sequence[bytes], what: Sequence[str] = ()) -> None:
    """Send them at once and wait until each that asked for it is acknowledged. `what` names them, by their
    sequence number. Raises OSError for the first that fails; nothing of it is left on the socket."""
    link.send(b"".join(messages))
    expected = sum(bool(struct.unpack_from("=H", each, 6)[0] & ACK) for each in messages)
    trouble: OSError | None = None
    while expected:
        try:
            answers = list(_received(link))
        except BlockingIOError:
            break
        for kind, sequence, body in answers:
            if kind != _ERROR:
                continue
            expected -= 1
            if code := struct.unpack_from("=i", body)[0]:  # 0 is success
                name = what[sequence] if sequence < len(what) else f"message {sequence}"
                trouble = trouble or OSError(-code, f"{name}: {os.strerror(-code)}")
                # The other answers are there by now, or never come: a transaction may be refused as a whole.
                link.setblocking(False)
    link.settimeout(_TIMEOUT)
    if trouble:
        raise trouble


def dump(link: socket.socket, kind: int, body: bytes) -> Iterator[bytes]:
    """The bodies of all that the kernel lists. Raises OSError."""
    link.send(message(kind, REQUEST | DUMP, 0, body))
    while True:
        for answered, _, content in _received(link):
            if answered == _DONE:
                return
            if answered == _ERROR:
                code = -struct.unpack_from("=i", content)[0]
                raise OSError(code, os.strerror(code))
            yield content


def _received(link: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence number and body of the next messages."""
    try:
        data = link.recv(1 << 18)
    except TimeoutError:
        raise OSError("netlink: no answer") from None
    while len(data) >= 16:
        length, kind, _, sequence, _ = struct.unpack_from("=IHHII", data)
        if not 16 <= length <= len(data):
            return
        yield kind, sequence, data[16:length]
        data = data[(length + 3) & ~3 :]
