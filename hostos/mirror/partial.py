"""A file on its way, on the disk: its blocks, who brought them, and the hash of what is contiguous.

The file has its full length from the start; the journal beside it says which blocks (1 MiB) are there
and from whom, a line each, so that a killed proxy goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

from hostos.mirror.store import BLOCK, journal

_MISSING, _TAKEN, _DONE = 0, 1, 2


class Partial:
    """`size` in bytes. `authors`: of each block, the names of the sources that brought it."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._file = self._journal = -1
        self._clear()

    def _clear(self) -> None:
        count = -(-self.size // BLOCK)
        self._state = bytearray(count)
        self._have = [0] * count
        self.authors: list[set[str]] = [set() for _ in range(count)]
        self._hash = hashlib.sha256()
        self.hashed = 0
        """Bytes from the start that are there."""
        self.tainted = False
        """Has a peer brought any of it?"""

    async def open(self) -> None:
        """Take up what is there already. Raises OSError."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        known = self._read_journal()
        os.truncate(self._file, self.size)
        self._journal = os.open(journal(self.path), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        for number, names in known.items():
            self._state[number], self._have[number], self.authors[number] = _DONE, self.length(number), names
            self.tainted = self.tainted or any(name.startswith("peer:") for name in names)
        await self._advance()

    def _read_journal(self) -> dict[int, set[str]]:
        found = {}
        try:
            lines = journal(self.path).read_text().splitlines()
        except OSError:
            return {}
        for line in lines:
            number, *names = line.split()
            if number.isdigit() and int(number) < len(self._state) and names:
                found[int(number)] = set(names)
        return found

    def close(self) -> None:
        for descriptor in (self._file, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._journal = -1

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        journal(self.path).unlink(missing_ok=True)

    async def restart(self) -> None:
        """Forget all that has come."""
        self.close()
        self.remove()
        self._clear()
        await self.open()

    def sync(self) -> None:
        os.fdatasync(self._file)

    # --- blocks ---

    def length(self, number: int) -> int:
        return min(BLOCK, self.size - number * BLOCK)

    @property
    def complete(self) -> bool:
        return self._state.count(_DONE) == len(self._state)

    @property
    def missing(self) -> int:
        """Blocks that nobody has taken on."""
        return self._state.count(_MISSING)

    def take(self, most: int) -> list[int]:
        """The first run of missing blocks, of which there is one, to be brought by who asks."""
        first = number = self._state.index(_MISSING)
        while number < len(self._state) and number - first < most and self._state[number] == _MISSING:
            self._state[number] = _TAKEN
            number += 1
        return list(range(first, number))

    def give_back(self, run: list[int]) -> None:
        for number in run:
            if self._state[number] == _TAKEN:
                self._state[number] = _MISSING

    def span(self, run: list[int]) -> tuple[int, int]:
        """(start, end) of what is lacking of a run, in bytes."""
        return run[0] * BLOCK + self._have[run[0]], run[-1] * BLOCK + self.length(run[-1])

    async def write(self, offset: int, data: bytes, run: list[int], author: str) -> None:
        """Blocks of `run` that become whole are journalled, and leave it. Raises OSError."""
        view = memoryview(data)
        while view:
            number = run[0]
            part = view[: number * BLOCK + self.length(number) - offset]
            written = 0
            while written < len(part):
                written += os.pwrite(self._file, part[written:], offset + written)
            if offset == self.hashed:
                self._hash.update(part)
                self.hashed += len(part)
            self._have[number] += len(part)
            self.authors[number].add(author)
            self.tainted = self.tainted or author.startswith("peer:")
            if self._have[number] == self.length(number):
                self._state[number] = _DONE
                run.pop(0)
                names = " ".join(sorted(self.authors[number]))
                os.write(self._journal, f"{number} {names}\n".encode())
            offset += len(part)
            view = view[len(part) :]
        await self._advance()

    # --- the hash ---

    async def _advance(self) -> None:
        """Hash what has become contiguous with what is hashed."""
        while self.hashed < self.size:
            number = self.hashed // BLOCK
            until = number * BLOCK + self._have[number]
            if until <= self.hashed:
                return
            start = self.hashed
            data = await asyncio.to_thread(os.pread, self._file, until - start, start)
            if not data:
                return
            if self.hashed != start:
                continue  # another one was faster
            self._hash.update(data)
            self.hashed += len(data)

    async def has(self, sha256: str) -> bool:
        """Is all of it there, and right?"""
        await self._advance()
        return self.hashed == self.size and self._hash.hexdigest() == sha256
