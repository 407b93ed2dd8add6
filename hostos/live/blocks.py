"""Verified blocks by CID: in memory, in the cache, or from gateways, each fetched once at a time.

The cache is a directory shared by everything that is read by CID: one file per block, proved again when it
is read. Nothing depends on it: what does not fit is fetched again.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from hostos.live.cid import Cid
from hostos.live.dagpb import MAX_BLOCK
from hostos.live.gateways import Gateways
from hostos.live.source import SourceError

MEMORY = 8 * 1024 * 1024
"""Bytes of blocks kept in memory: a reader comes back to the same block several times."""
AHEAD = 12
"""Most blocks under way that nobody waits for."""
EVICT = 0.1
"""Share of the cache that goes, the longest unused first, when it is full."""


@dataclass
class _Flight:
    """A block that is being fetched. `under_way`: its turn has come."""

    under_way: bool = False
    done: trio.Event = field(default_factory=trio.Event)
    block: bytes | None = None


class Blocks:
    """All blocks of this machine. `directory`: the cache; `log`: where news go."""

    def __init__(
        self, nursery: trio.Nursery, directory: Path, log: Callable[[str], None] = lambda _message: None
    ) -> None:
        self._nursery, self._directory, self._log = nursery, directory, log
        self._memory: OrderedDict[Cid, bytes] = OrderedDict()
        self._in_memory = 0
        self._flights: dict[tuple[Cid, int], _Flight] = {}
        self._ahead = trio.CapacityLimiter(AHEAD)
        self.trouble = ""

    # --- what is here -------------------------------------------------------------------------------

    def path(self, cid: Cid) -> Path:
        name = str(cid)
        return self._directory / name[-3:-1] / name

    def has(self, cid: Cid) -> bool:
        """Whether it seems to be here; only `peek` proves it."""
        return cid in self._memory or cid.inline is not None or self.path(cid).exists()

    def peek(self, cid: Cid) -> bytes | None:
        """The block if it is here, verified. What is damaged is removed."""
        if (inline := cid.inline) is not None:
            return inline
        if (block := self._memory.get(cid)) is not None:
            self._memory.move_to_end(cid)
            return block
        path = self.path(cid)
        try:
            with path.open("rb") as file:
                block = file.read(MAX_BLOCK + 1)
        except OSError:
            return None
        if not cid.matches(block):
            with suppress(OSError):
                path.unlink()
            return None
        self._remember(cid, block)
        return block

    def _remember(self, cid: Cid, block: bytes) -> None:
        if cid in self._memory:
            return
        self._memory[cid] = block
        self._in_memory += len(block)
        while self._in_memory > MEMORY and len(self._memory) > 1:
            _, old = self._memory.popitem(last=False)
            self._in_memory -= len(old)

    # --- fetching -----------------------------------------------------------------------------------

    async def get(self, cid: Cid, gateways: Gateways, deadline: float, *, ahead: bool = False) -> bytes:
        """The block, verified, within `deadline` seconds. Raises SourceError.

        `ahead`: nobody waits for it yet, so it waits until few others are under way.
        """
        with trio.move_on_after(deadline):
            while (block := self.peek(cid)) is None:
                # Whoever asks other gateways does not wait for these.
                key = (cid, id(gateways))
                flight = self._flights.get(key)
                if flight is None or not (flight.under_way or ahead):
                    # What only waited for its turn is overtaken; it will find the block here.
                    flight = self._flights[key] = _Flight()
                    self._nursery.start_soon(self._fetch, key, flight, gateways, deadline, ahead)
                await flight.done.wait()
                if (block := flight.block) is not None:
                    return block
                if gateways.closed:
                    raise SourceError("the image was unmounted")
            return block
        raise SourceError(f"no data within {deadline:g} s; {gateways.why_late()}")

    async def _fetch(
        self, key: tuple[Cid, int], flight: _Flight, gateways: Gateways, deadline: float, ahead: bool
    ) -> None:
        cid = key[0]
        try:
            with trio.move_on_after(deadline):
                if ahead:
                    async with self._ahead:
                        other = self._flights.get(key)
                        if other is not None and other is not flight:
                            await other.done.wait()
                        flight.under_way = True
                        flight.block = self.peek(cid) or await gateways.fetch(cid)
                else:
                    flight.under_way = True
                    flight.block = await gateways.fetch(cid)
            if flight.block is not None:
                self.keep(cid, flight.block)
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]
            flight.done.set()

    def keep(self, cid: Cid, block: bytes) -> None:
        """Put a verified block into memory and the cache."""
        self._remember(cid, block)
        if cid.inline is not None:
            return
        path = self.path(cid)
        for attempt in range(2):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(block)
                return
            except OSError as error:
                with suppress(OSError):
                    path.unlink()
                if attempt or error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._evict():
                    trouble = f"the cache of blocks cannot be written: {error.strerror}"
                    if trouble != self.trouble:
                        self._log(trouble)
                    self.trouble = trouble
                    return

    # --- the cache as a whole -----------------------------------------------------------------------

    def _files(self) -> Iterator[os.DirEntry[str]]:
        with suppress(FileNotFoundError):
            for directory in os.scandir(self._directory):
                if directory.is_dir(follow_symlinks=False):
                    yield from os.scandir(directory)

    def size(self) -> int:
        """Bytes of all blocks in the cache."""
        return sum(file.stat().st_size for file in self._files())

    def _evict(self) -> bool:
        """Make room: blocks can be had again, so nothing of them is held. Whether anything went."""
        files = sorted((file.stat().st_mtime, file.stat().st_size, file.path) for file in self._files())
        room = EVICT * sum(size for _, size, _ in files)
        freed = 0
        for _, size, path in files:
            if freed > room:
                break
            with suppress(OSError):
                Path(path).unlink()
                freed += size
        return freed > 0
