"""Where a medium is written: looked at before anything is made, and either whole or not there afterwards."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostos.errors import UserError, failure


def check_file(target: Path, size: float) -> None:
    """Raises UserError unless a file of about `size` bytes can be made, or replaced."""
    if target.is_dir():
        raise UserError(f"{target} is a directory", "name a file in it")
    if target.exists() and not target.is_file():
        raise UserError(
            f"{target} is a device, not a file", f"write a file, then copy it: dd if=FILE of={target} bs=4M conv=fsync"
        )
    _check_room(target.parent, size)


def check_directory(target: Path, size: float) -> None:
    """Raises UserError unless `target` is, or can become, an empty directory with room for `size` bytes."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is not a directory", "name a new directory")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty", "name a new directory")
    _check_room(target if target.is_dir() else target.parent, size)


def _check_room(directory: Path, size: float) -> None:
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory", "name a place in a directory that is there")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{directory} cannot be written to", "name a place in a directory of yours")
    free = shutil.disk_usage(directory).free
    if free < size:
        raise UserError(
            f"making it takes {size / 1e6:.0f} MB in {directory}, and {free / 1e6:.0f} MB are free",
            "make room, or name another place",
        )


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A directory in the file system of `target`, gone when the block ends: what is moved from it to `target`
    is there at once. Raises UserError if the operating system refuses something in the block."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
            yield Path(work)
    except OSError as error:
        raise failure(f"{target} cannot be written: {error.strerror or error}") from None
