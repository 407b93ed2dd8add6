"""Verified ranges of a UnixFS file, fetched from gateways when they are read: the other `BlockSource`.

To the scheduler, the journal and the boot trace the file is a row of pieces, as a torrent is. A piece is
as large as the file's chunks, so that one is one block (64 KiB as hostos publishes them).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import trio

from hostos.live import unixfs
from hostos.live.blocks import Blocks
from hostos.live.cid import RAW, Cid
from hostos.live.dagpb import BlockError
from hostos.live.gateways import Gateways
from hostos.live.journal import Journal, Why
from hostos.live.schedule import Schedule
from hostos.live.source import ReadAhead, SourceError, SourceStats, Waits
from hostos.live.unixfs import File, Leaf

LEAST_PIECE, MOST_PIECE = 16 * 1024, 2 * 1024 * 1024
TEND = 0.1
"""Seconds between two looks at what could be fetched ahead, while there is something."""


async def piece_size(file: File, fetch: unixfs.Fetch) -> int:
    """The size of the file's chunks: of the first, which all but the last have. Raises BlockError."""
    below, first = file, file.size
    for _ in range(unixfs.MAX_DEPTH):
        if not below.parts or below.inline:
            break
        cid, first = below.parts[0]
        if cid.codec == RAW or first <= MOST_PIECE:
            break
        below = await unixfs.part(cid, first, fetch)
    return max(LEAST_PIECE, min(MOST_PIECE, first))


class IpfsSource:
    """A `BlockSource` over one file. `root`: its first block, decoded; `piece`: bytes of a piece;
    `deadline`: seconds for a read. `gateways` are its own, `blocks` everybody's.
    """

    def __init__(
        self, blocks: Blocks, gateways: Gateways, cid: Cid, root: File, piece: int, *, deadline: float = 120.0
    ) -> None:
        self._blocks, self.gateways, self.cid, self._root = blocks, gateways, cid, root
        self.deadline = deadline
        self.piece_size = piece
        self.pieces = max(1, -(-root.size // piece))
        self.journal = Journal(self.pieces)
        self.schedule = Schedule(self.pieces, piece, self._expected, self._ask)
        self._read_ahead = ReadAhead()
        self._here: set[int] = set()
        self._waiting: dict[int, int] = {}
        self._waits = Waits()
        self._stats = SourceStats(size=root.size)
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._early: list[int] = []
        """Asked for before there was a nursery."""

    @property
    def size(self) -> int:
        return self._root.size

    # --- life -------------------------------------------------------------------------------------

    def start(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._run)

    async def close(self) -> None:
        """Reads that wait fail."""
        self._scope.cancel()
        await self.gateways.close()

    async def _run(self) -> None:
        """Fetch ahead, and what nobody asked for."""
        with self._scope:
            async with trio.open_nursery() as self._nursery:
                while self._early:
                    self._ask(self._early.pop(0), 0)
                while True:
                    await trio.sleep(TEND if self.schedule.active else 10 * TEND)
                    self.schedule.pump(waiting=bool(self._waiting))

    def replay(self, pieces: Iterable[int]) -> deque[int]:
        """Fetch these pieces ahead, in this order; `schedule.drop` leaves off."""
        plan = self.schedule.replay(pieces)
        self.schedule.pump(waiting=bool(self._waiting))
        return plan

    # --- reading ----------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        """Verified bytes; waits for them. Raises `SourceError` at the deadline, or if the file is damaged."""
        end = min(offset + length, self.size)
        if offset < 0 or end <= offset:
            return b""
        first, last = offset // self.piece_size, (end - 1) // self.piece_size
        self._stats.reads += 1
        self._stats.read_bytes += end - offset
        self.journal.reading(offset, end - offset, first, last)
        began = time.monotonic()
        missing = False

        async def fetch(cid: Cid) -> bytes:
            nonlocal missing
            if (block := self._blocks.peek(cid)) is not None:
                return block
            missing = True
            for piece in range(first, last + 1):
                self._stats.late += self.schedule.demanded(piece) is not None
            return await self._blocks.get(cid, self.gateways, self.deadline - (time.monotonic() - began))

        if ahead := self._read_ahead.pieces(first, last):
            self.schedule.ahead(range(last + 1, min(last + 1 + ahead, self.pieces)))
        for piece in range(first, last + 1):
            self._waiting[piece] = self._waiting.get(piece, 0) + 1
        try:
            self.schedule.pump(waiting=True)
            data = await unixfs.read(self._root, offset, end, fetch)
        except BlockError as error:
            raise self._failed(f"the file is not sound: {error}") from None
        except SourceError as error:
            raise self._failed(f"no data within {self.deadline:g} s; {self.gateways.why_late()}") from error
        finally:
            for piece in range(first, last + 1):
                self._waiting[piece] -= 1
                if not self._waiting[piece]:
                    del self._waiting[piece]
        if missing:
            self._stats.misses += 1
            self._waits.add(time.monotonic() - began)
        for piece in range(first, last + 1):
            self._arrived(piece, "demand")
        self.schedule.pump(waiting=bool(self._waiting))
        return data

    def _failed(self, why: str) -> SourceError:
        self._stats.errors += 1
        self._stats.last_error = "the image was unmounted" if self.gateways.closed else why
        return SourceError(self._stats.last_error)

    def _arrived(self, piece: int, why: Why) -> None:
        if piece not in self._here:
            self._here.add(piece)
            self.journal.arrived(piece, why)

    # --- ahead of reads ---------------------------------------------------------------------------

    def _expected(self, piece: int) -> bool:
        return piece in self._here or piece in self._waiting

    def _ask(self, piece: int, _priority: int) -> None:
        if self._nursery is None:
            self._early.append(piece)
        else:
            self._nursery.start_soon(self._fetch_ahead, piece)

    async def _fetch_ahead(self, piece: int) -> None:
        async def fetch(cid: Cid) -> bytes:
            return await self._blocks.get(cid, self.gateways, self.deadline, ahead=True)

        start = piece * self.piece_size
        try:
            # Not joined: the bytes are of no interest yet.
            for item in await unixfs.leaves(self._root, start, min(start + self.piece_size, self.size), fetch):
                if isinstance(item, Leaf) and not self._blocks.has(item.cid):
                    await fetch(item.cid)
        except (SourceError, BlockError):
            # Whoever reads it will be told.
            self.schedule.asked.pop(piece, None)
            return
        self._arrived(piece, self.schedule.arrived(piece))
        self.schedule.pump(waiting=bool(self._waiting))

    # --- telling ----------------------------------------------------------------------------------

    def stats(self) -> SourceStats:
        stats = self._stats
        stats.downloaded, stats.wasted = self.gateways.downloaded, self.gateways.wasted
        stats.verified = sum(min(self.piece_size, self.size - piece * self.piece_size) for piece in self._here)
        stats.hash_failures, stats.stalls = self.gateways.wrong, self.gateways.hedged
        came = self.journal.counts()
        stats.prefetched, stats.prefetch_used = came["trace"] + came["ahead"], self.journal.used
        stats.peers, stats.banned = len(self.gateways.all()), self.gateways.banned
        self._waits.into(stats)
        return stats

    def peers(self) -> list[dict[str, Any]]:
        """The gateways, as `container stats` shows peers."""
        return self.gateways.describe()
