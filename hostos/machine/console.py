"""The serial console, on this terminal: what is typed goes to the guest until the detach key.

QEMU serves one console client at a time and lets others wait without a word, so a lock says who
has it. The log is written all the while, whether or not somebody is connected.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from hostos.errors import UserError, failure
from hostos.machine.instance import Instance
from hostos.machine.terminal import raw_mode

DEFAULT_KEY = "ctrl-]"
# Shown first, so that there is something to see: a prompt that waits says nothing new.
_SHOWN_FIRST = 4096
_WAIT_FOR_SOCKET = 5.0

Ended = Literal["detached", "ended"]


def parse_key(text: str) -> bytes:
    """`ctrl-]`, `ctrl-a` … as the byte that key sends; raises UserError."""
    match = re.fullmatch(r"(?:ctrl-|\^)([a-z@\[\]\\^_])", text.lower())
    if not match:
        raise UserError(f"{text!r} is no key to detach with", "e.g. --detach-key ctrl-] or --detach-key ctrl-o")
    return bytes([ord(match[1].upper()) & 0x1F])


def attach(instance: Instance, key: bytes, connected: Callable[[], None]) -> Ended:
    """Connect this terminal (stdin and stdout) to the console until `key` is typed or QEMU ends.
    `connected` is called before anything is shown.

    Raises UserError if the machine does not run, the console is in use, or stdin is no terminal.
    """
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        raise UserError(
            "the console needs a terminal", "to read it: hostos logs -f; to run a command: hostos run -- COMMAND"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone(instance))
        console = stack.enter_context(_connect(instance))
        connected()
        _show(_tail(instance.serial_log))
        stack.enter_context(raw_mode())
        return _carry(console, key)


def _carry(console: socket.socket, key: bytes) -> Ended:
    stdin = sys.stdin.fileno()
    while True:
        ready = select.select([stdin, console], [], [])[0]
        if console in ready:
            try:
                data = console.recv(1 << 16)
            except ConnectionError:
                data = b""
            if not data:
                return "ended"
            _show(data)
        if stdin in ready:
            typed = os.read(stdin, 1 << 12)
            before, detach, _ = typed.partition(key)
            try:
                console.sendall(before)
            except (ConnectionError, BrokenPipeError):
                return "ended"
            if detach or not typed:
                return "detached"


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _tail(log: Path) -> bytes:
    """The end of what the guest has printed, from the beginning of a line."""
    try:
        with log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _SHOWN_FIRST))
            data = stream.read()
    except FileNotFoundError:
        return b""
    return data if size <= _SHOWN_FIRST else data.partition(b"\n")[2]


def _connect(instance: Instance) -> socket.socket:
    """QEMU may only just have been started: it is waited for a little."""
    give_up = time.monotonic() + _WAIT_FOR_SOCKET
    while True:
        console = socket.socket(socket.AF_UNIX)
        try:
            console.connect(os.fspath(instance.console_socket))
        except OSError as error:
            console.close()
            starting = instance.state()[0] == "starting"
            if not starting and instance.process() is None:
                raise _not_running(instance) from None
            if time.monotonic() > give_up:
                raise failure(f"the console {instance.console_socket} does not answer: {error}") from error
            time.sleep(0.05)
        else:
            return console


@contextlib.contextmanager
def _alone(instance: Instance) -> Iterator[None]:
    try:
        lock = (instance.socket_dir / "console.lock").open("ab+")
    except FileNotFoundError:
        raise _not_running(instance) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            who = lock.read().decode(errors="replace").strip()
            raise UserError(
                f"the console of machine {instance.name!r} is in use (process {who or 'unknown'})",
                "detach there, or only read: hostos logs -f",
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        yield


def _not_running(instance: Instance) -> UserError:
    option = "" if instance.name == "default" else f" -m {instance.name}"
    return UserError(
        f"machine {instance.name!r} is not running", f"hostos up{option}; what it said: hostos logs{option}"
    )
