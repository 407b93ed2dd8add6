"""A machine's logs on the host: printed, followed, and ended with the machine."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import BinaryIO

from hostos.machine.instance import Instance

_POLL = 0.1
_BLOCK = 1 << 16


def show(instance: Instance, path: Path, *, lines: int | None, follow: bool) -> None:
    """Print the log `path` (its last `lines`, if given) to stdout; with `follow` go on until the
    machine has ended. A start that replaces the file begins anew. Raises FileNotFoundError."""
    while follow and not path.exists() and _at_work(instance):
        time.sleep(_POLL)
    with path.open("rb") as stream:
        if lines is not None:
            _seek_last_lines(stream, lines)
        _copy(stream)
        if not follow:
            return
        stream_id = os.fstat(stream.fileno()).st_ino
        while _at_work(instance) and _inode(path) in (stream_id, None):
            _copy(stream)
            time.sleep(_POLL)
        # What it said between the last look and its end.
        _copy(stream)
    if _at_work(instance):
        show(instance, path, lines=None, follow=True)


def _at_work(instance: Instance) -> bool:
    return instance.process() is not None or instance.state()[0] == "starting"


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _copy(stream: BinaryIO) -> None:
    while data := stream.read(_BLOCK):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def _seek_last_lines(stream: BinaryIO, lines: int) -> None:
    """Leave `stream` where its last `lines` lines begin (an unfinished one counts)."""
    place = stream.seek(0, os.SEEK_END)
    found = b""
    while place > 0 and found.count(b"\n") <= lines:
        size = min(_BLOCK, place)
        place -= size
        stream.seek(place)
        found = stream.read(size) + found
    kept = found.splitlines(keepends=True)[-lines:] if lines else []
    stream.seek(place + len(found) - sum(map(len, kept)))
