"""One process at a time: a lock that is waited for, with a deadline."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hostos.errors import failure

_POLL = 0.02


@contextmanager
def exclusive(path: Path, deadline: float, why: str, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock file `path` (made if it is not there) while the body runs.

    Waits up to `deadline` seconds for others, calling `waiting` (who waits for long) every second; then
    raises UserError (status 1) that begins with `why`. The kernel drops the lock of a process that dies.
    """
    with path.open("a") as file:
        until = time.monotonic() + deadline
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise failure(f"{why}, for over {deadline:.0f} s", f"see who: fuser {path}") from None
                if waiting is not None:
                    waiting()
                time.sleep(_POLL if waiting is None else 1.0)
        yield
