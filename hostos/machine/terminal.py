"""A command in the guest on this process's own stdin, stdout and stderr."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import threading
import tty as terminal_modes
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import BinaryIO

import paramiko

from hostos.machine.connection import Connection, Terminal, drain, has_ended

_STDIN = 0


def interact(
    connection: Connection, argv: Sequence[str], *, tty: bool, first_output: Callable[[], None] | None = None
) -> int:
    """See `Connection.interact`."""
    with contextlib.ExitStack() as stack:
        channel = connection.start(argv, terminal=_terminal() if tty else None)
        stack.callback(channel.close)
        if tty:
            stack.enter_context(_window_changes(channel))
            stack.enter_context(raw_mode())
        stack.enter_context(_forwarding(channel))
        interrupted = False
        while True:
            try:
                _show_until_end(channel, first_output)
                break
            except KeyboardInterrupt:
                if interrupted or tty:
                    raise
                interrupted = True
                connection.signal(channel, "INT")
        return connection.status(channel, argv[0])


def _show_until_end(channel: paramiko.Channel, first_output: Callable[[], None] | None) -> None:
    while True:
        out, err = bytearray(), bytearray()
        ended = has_ended(channel)
        moved = drain(channel, out, err)
        if out and first_output:
            first_output()
            first_output = None
        _write(sys.stdout.buffer, out)
        _write(sys.stderr.buffer, err)
        if ended and not moved:
            return
        if not moved:
            # Once the stream has ended it is readable for ever: then only the status is missing.
            if channel.eof_received:
                channel.status_event.wait(0.05)
            else:
                select.select([channel], [], [], 1.0)


def _write(stream: BinaryIO, data: bytearray) -> None:
    if data:
        stream.write(data)
        stream.flush()


def _terminal() -> Terminal:
    size = shutil.get_terminal_size()
    return Terminal(os.environ.get("TERM") or "vt100", size.columns, size.lines)


@contextlib.contextmanager
def _forwarding(channel: paramiko.Channel) -> Iterator[None]:
    """stdin goes to the command while the body runs.

    In a thread: sending waits while the command does not read, and its output must flow meanwhile.
    """
    stop_reading, stop_writing = os.pipe()

    def forward() -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            while True:
                ready = select.select([_STDIN, stop_reading], [], [])[0]
                if stop_reading in ready:
                    return
                data = os.read(_STDIN, 1 << 15)
                if not data:
                    break
                channel.sendall(data)
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            channel.shutdown_write()

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(stop_writing, b".")
        # A send that waits for a window ends with the channel.
        channel.close()
        thread.join(2.0)
        if not thread.is_alive():
            os.close(stop_reading)
            os.close(stop_writing)


@contextlib.contextmanager
def raw_mode() -> Iterator[None]:
    """Every key, Ctrl-C too, goes to the guest."""
    if not os.isatty(_STDIN):
        yield
        return
    before = termios.tcgetattr(_STDIN)
    try:
        terminal_modes.setraw(_STDIN, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _window_changes(channel: paramiko.Channel) -> Iterator[None]:
    def changed(_signal: int, _frame: FrameType | None) -> None:
        size = shutil.get_terminal_size()
        with contextlib.suppress(OSError, paramiko.SSHException):
            channel.resize_pty(size.columns, size.lines)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGWINCH, changed)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
