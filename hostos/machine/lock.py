"""One command at a time on a machine: a lock that dies with its holder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError

# Others look whether the lock is held by taking it for an instant.
_PATIENCE = 0.5


@dataclass(frozen=True)
class Holder:
    """The process that is at work on a machine, and with which command ("" and 0: not known)."""

    verb: str = ""
    pid: int = 0


@contextlib.contextmanager
def locked(path: Path, machine: str, verb: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` while the body runs.

    `wait`: seconds to wait for another holder. Raises UserError naming the holder after that.
    """
    give_up = time.monotonic() + max(wait, _PATIENCE)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(path.open("ab+", buffering=0))
        while not (_try(stream.fileno(), fcntl.LOCK_EX) and _is_there(path, stream.fileno())):
            if time.monotonic() > give_up:
                other = _read(path)
                who = f"hostos {other.verb} (process {other.pid})" if other.pid else "another hostos command"
                raise UserError(
                    f"machine {machine!r} is busy: {who} is at work on it",
                    f"wait for it to end, or end it: kill {other.pid}" if other.pid else "try again",
                )
            time.sleep(0.05)
            if not _is_there(path, stream.fileno()):
                # The machine was removed meanwhile; perhaps it has been made anew.
                stream.close()
                try:
                    stream = stack.enter_context(path.open("ab+", buffering=0))
                except FileNotFoundError:
                    raise UserError(
                        f"machine {machine!r} was removed meanwhile", "hostos ls shows all machines"
                    ) from None
        stream.truncate(0)
        # Only for others to read: a machine on a full disk must not be kept from being powered off.
        with contextlib.suppress(OSError):
            stream.write(json.dumps({"verb": verb, "pid": os.getpid()}).encode())
        try:
            yield
        finally:
            stream.truncate(0)


def holder(path: Path) -> Holder | None:
    """Who holds the lock file `path`, None if nobody does."""
    try:
        with path.open("rb") as stream:
            return None if _try(stream.fileno(), fcntl.LOCK_SH) else _read(path)
    except FileNotFoundError:
        return None


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the file that is open as `descriptor`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _read(path: Path) -> Holder:
    try:
        content = json.loads(path.read_bytes())
        return Holder(str(content["verb"]), int(content["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Holder()
