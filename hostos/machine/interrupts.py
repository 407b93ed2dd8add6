"""Ctrl-C and its like, held back while something must not be left half done.

Python raises KeyboardInterrupt between any two instructions of the main thread, also inside its own
locks and queues, which are not made for that (a Condition may then be released twice).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Signals that arrive in the body are acted upon after it.

    Gives a function that says whether one has arrived, for bodies that wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    arrived: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    before: dict[int, Any] = {}
    try:
        for number in _NUMBERS:
            handler = signal.getsignal(number)
            # Where nothing of Python's listens (default, ignored), nothing is raised either.
            if callable(handler):
                before[number] = handler
                signal.signal(number, note)
        yield lambda: bool(arrived)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for each in arrived:
            before[each](each, None)
