"""Verified files by their SHA-256, and files on their way (docs/mirror.md has the layout).

    sha256/ab/abcdef…       a verified file
    partial/abcdef…         a file that is being fetched, at its full length
    partial/abcdef….parts   which of its blocks are there, and from whom: a line each

A file gets its place in `sha256` by rename(2), after its hash matched and it is on the disk.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hostos.mirror.errors import RefusedError
from hostos.mirror.ledger import Ledger
from hostos.paths import private_dir

BLOCK = 1 << 20
"""What is fetched from one source at a time, at least; a killed proxy loses no more of each."""
RESERVE = 64 << 20
"""Bytes of the disk that are left to others."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Evicted:
    files: int = 0
    size: int = 0


class Store:
    """`limit`: bytes it may hold, 0 for no limit."""

    def __init__(self, root: Path, ledger: Ledger, limit: int = 0) -> None:
        self.root = root
        self.ledger = ledger
        self.limit = limit
        self.files = private_dir(root / "sha256")
        self.partials = private_dir(root / "partial")

    def path(self, sha256: str) -> Path:
        return self.files / sha256[:2] / sha256

    def size(self, sha256: str) -> int | None:
        """Bytes of the file, None if it isn't there."""
        try:
            return self.path(sha256).stat().st_size
        except OSError:
            return None

    def adopt(self, partial: Path, sha256: str, location: str, *, asked: bool) -> Path:
        """Take a partial file whose hash has been found right. Raises OSError."""
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        target = self.path(sha256)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        partial.replace(target)
        journal(partial).unlink(missing_ok=True)
        self.ledger.add(sha256, size, location, asked=asked)
        return target

    def remove(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)
        self.ledger.remove(sha256)

    def make_room(self, size: int) -> None:
        """Have `size` more bytes fit, by the limit and on the disk, removing what was used longest ago.

        Raises RefusedError (507) if the disk is too full even so.
        """
        held = self.ledger.total()[1]
        over = held + size - self.limit if self.limit else 0
        disk = shutil.disk_usage(self.root)
        reserve = min(RESERVE, disk.total // 64)
        lacking = size + reserve - disk.free
        if max(over, lacking) > 0:
            self.evict(max(over, lacking))
            if shutil.disk_usage(self.root).free < size + reserve:
                raise RefusedError(507, f"the cache's disk is full: {self.root}")

    def evict(self, size: int) -> Evicted:
        """Remove at least `size` bytes, if there are so many."""
        freed = files = 0
        for content in self.ledger.contents():
            if freed >= size:
                break
            self.remove(content.sha256)
            freed += content.size
            files += 1
        return Evicted(files, freed)

    def expire(self, used_before: float) -> Evicted:
        """Remove what was not used since `used_before` (Unix time)."""
        old = [content for content in self.ledger.contents() if content.used < used_before]
        for content in old:
            self.remove(content.sha256)
        return Evicted(len(old), sum(content.size for content in old))

    def remove_partials(self, keep: Callable[[str], bool] = lambda _: False) -> Evicted:
        """Remove files on their way, except those that `keep` says."""
        files = freed = 0
        for path in list(self.partials.iterdir()):
            if keep(path.name[:64]):
                continue
            freed += path.stat().st_blocks * 512
            files += not path.name.endswith(".parts")
            path.unlink(missing_ok=True)
        return Evicted(files, freed)

    def reconcile(self) -> None:
        """Make the ledger agree with the files, whatever a crash has left."""
        there = dict(self.walk())
        for content in self.ledger.contents():
            if there.pop(content.sha256, None) != content.size:
                self.remove(content.sha256)
        for sha256, size in there.items():
            self.ledger.add(sha256, size, "", asked=True)

    def walk(self) -> Iterator[tuple[str, int]]:
        """(SHA-256, bytes) of every file."""
        for directory in sorted(self.files.iterdir()):
            if directory.is_dir():
                for path in sorted(directory.iterdir()):
                    if _SHA256.fullmatch(path.name):
                        yield path.name, path.stat().st_size


def journal(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.parts")


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
