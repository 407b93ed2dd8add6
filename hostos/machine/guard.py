"""What every command that changes a machine is wrapped in."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from hostos.errors import failure
from hostos.machine.instance import Instance
from hostos.machine.lock import locked


@contextlib.contextmanager
def file_faults(instance: Instance) -> Iterator[None]:
    """A full or read-only file system is told as such. (What was started has been ended by then.)"""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        where = error.filename or instance.directory
        raise failure(
            f"machine {instance.name!r}: {error.strerror or error}: {where}",
            "make room, or choose another place: HOSTOS_HOME=<directory>",
        ) from error


@contextlib.contextmanager
def at_work(instance: Instance, verb: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of `instance` for the command `verb`, with `file_faults` and `unwinding_on_signals`.

    `wait`: seconds to wait for another command that is at work on it. Raises UserError.
    """
    with unwinding_on_signals(), file_faults(instance), locked(instance.lock_file, instance.name, verb, wait=wait):
        yield


@contextlib.contextmanager
def unwinding_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the body like Ctrl-C, so that it cleans up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
