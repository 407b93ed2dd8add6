"""Several sources at work on one file: peers first, the mirror when they are slow or have none of it.

Each source takes a run of missing blocks. One that fails, or brings nothing, loses what it took to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from hostos.mirror.errors import MissingError, RefusedError, UnreachableError, UnverifiedError
from hostos.mirror.partial import Partial
from hostos.mirror.sources import Source, SourceError

MIRROR_GRACE_S = 1.5
"""How long peers have the file to themselves before the mirror joins, if they are slow."""
SLOW_RATE = 256 << 10
"""Bytes per second; if all peers together bring less, the mirror joins."""
FIRST_BYTE_S = 1.5
"""A peer that has brought nothing yet after so long,"""
STALL_S = 3.0
"""or brings nothing for so long, loses what it was to bring to another source,"""
CRAWL_RATE = 32 << 10
"""and so does one below this rate (bytes per second), if the mirror works."""
PEERS_AT_ONCE = 4
TICK_S = 0.1
MAX_RUN = 16
"""Blocks a source takes at once if there are others."""
MIRROR_ATTEMPTS = 3
PAUSE_S = 0.5

Blame = Callable[[str, str, bool], None]
"""Hears what a source did: its name, the reason, and whether it lied."""


@dataclass
class Sources:
    """Who may have the file. `mirrors`: in order of preference; `more_peers`: asked once, for peers
    that are only found by looking for them."""

    peers: list[Source]
    mirrors: list[Source]
    more_peers: Callable[[], Awaitable[list[Source]]] | None = None


@dataclass(eq=False)
class Worker:
    """A source at work. `run`: the blocks it has taken on."""

    source: Source
    began: float
    last: float
    run: list[int]
    received: int = 0
    task: asyncio.Task[None] = field(init=False)


@dataclass(eq=False)
class Gathering:
    """`where`: the file's name, for messages; `changed` is called whenever more is there; `one_by_one`: each
    source brings all of it, alone."""

    partial: Partial
    where: str
    blame: Blame
    changed: Callable[[], None]
    one_by_one: bool = False
    _peers: list[Source] = field(default_factory=list)
    _workers: list[Worker] = field(default_factory=list)
    _looking: asyncio.Future[list[Source]] | None = None
    _peers_began: float | None = None
    _mirror_works: bool = False
    _refused: dict[str, SourceError] = field(default_factory=dict)

    async def run(self, sources: Sources) -> None:
        """Returns when all blocks are there. Raises RefusedError if no source is left, OSError of the disk."""
        self._peers, mirrors = list(sources.peers), list(sources.mirrors)
        if sources.more_peers is not None and not self.partial.complete:
            self._looking = asyncio.ensure_future(sources.more_peers())
        attempts = 0
        try:
            while not self.partial.complete:
                now = time.monotonic()
                self._reap()
                if self._looking and self._looking.done():
                    self._peers += self._looking.result()
                    self._looking = None
                busy_peers = [worker for worker in self._workers if worker.source.is_peer]
                busy_mirror = len(busy_peers) < len(self._workers)
                self._drop_stalled(busy_peers, now)
                slow = self._peers_are_slow()
                if mirrors and (failed := self._refused.pop(mirrors[0].name, None)):
                    attempts += 1
                    if failed.lied or failed.status >= 400 or attempts >= MIRROR_ATTEMPTS:
                        self._refused[mirrors.pop(0).name] = failed
                        attempts = 0
                        continue
                mirror_next = bool(mirrors) and not busy_mirror
                if mirror_next and slow and self.partial.missing:
                    # Before the next peers: with many that are slow, the file would never come.
                    self._start(mirrors[0], PAUSE_S * attempts)
                    mirror_next = False
                while self._peers and self.partial.missing and len(busy_peers) < PEERS_AT_ONCE:
                    busy_peers.append(self._start(self._peers.pop(0)))
                if mirror_next and not busy_peers and self.partial.missing:
                    self._start(mirrors[0], PAUSE_S * attempts)
                elif not self._workers and not self._peers and not mirrors and self._looking is None:
                    raise self._why()
                await self._pause()
        finally:
            if self._looking:
                self._looking.cancel()
                self._looking = None
            tasks = [worker.task for worker in self._workers]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._reap()

    def _drop_stalled(self, peers: list[Worker], now: float) -> None:
        """Take their blocks from peers that bring nothing, or next to nothing while the mirror works."""
        for worker in peers:
            silent = now - worker.last > (STALL_S if worker.received else FIRST_BYTE_S)
            crawls = now - worker.began > STALL_S and worker.received < CRAWL_RATE * (now - worker.began)
            # Alone, it keeps the mirror waiting.
            if silent or (crawls and self._mirror_works) or (self.one_by_one and self._peers_are_slow()):
                worker.task.cancel()
                self.blame(worker.source.name, "brings next to nothing", False)

    async def _pause(self) -> None:
        """Until a worker ends, or for a moment."""
        if self._workers:
            await asyncio.wait(
                [worker.task for worker in self._workers], timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED
            )
        else:
            await asyncio.sleep(0.01)

    def _peers_are_slow(self) -> bool:
        """After a while, which they have for themselves."""
        now = time.monotonic()
        if self._peers_began is None or now - self._peers_began < MIRROR_GRACE_S:
            return False
        peers = [worker for worker in self._workers if worker.source.is_peer]
        return sum(worker.received / (now - worker.began + 0.01) for worker in peers) < SLOW_RATE

    @property
    def _peers_suffice(self) -> bool:
        """Can the mirror be spared?"""
        some = bool(self._peers) or any(worker.source.is_peer for worker in self._workers)
        return some and not self._peers_are_slow()

    def _start(self, source: Source, after: float = 0.0) -> Worker:
        """Have the source bring the first missing blocks, of which there are some."""
        now = time.monotonic() + after
        if source.is_peer and self._peers_began is None:
            self._peers_began = now
        worker = Worker(source, now, now, self._take(source))
        worker.task = asyncio.create_task(self._work(worker, after))
        self._workers.append(worker)
        return worker

    def _take(self, source: Source) -> list[int]:
        missing = self.partial.missing
        if self.one_by_one:
            most = missing
        elif self._looking is not None and not source.is_peer:
            most = 1  # Whoever is found soon is to have the rest.
        elif source.is_peer or any(each.source is not source for each in self._workers):
            most = min(MAX_RUN, max(1, missing // 4))
        else:
            most = missing
        return self.partial.take(most)

    def _reap(self) -> None:
        for worker in [worker for worker in self._workers if worker.task.done()]:
            self._workers.remove(worker)
            self.partial.give_back(worker.run)
            if worker.task.cancelled():
                continue
            if (error := worker.task.exception()) is not None:
                raise error
            if worker.source.is_peer and worker.source.name not in self._refused:
                # It has done its part, and may be asked for what others fail to bring.
                self._peers.append(worker.source)

    async def _work(self, worker: Worker, after: float) -> None:
        await asyncio.sleep(after)
        source = worker.source
        while worker.run:
            offset, end = self.partial.span(worker.run)
            try:
                async with contextlib.aclosing(source.read(offset, end)) as parts:
                    async for data in parts:
                        worker.last = time.monotonic()
                        worker.received += len(data)
                        self._mirror_works = self._mirror_works or not source.is_peer
                        await self.partial.write(offset, data, worker.run, source.name)
                        self.changed()
                        offset += len(data)
            except SourceError as error:
                self._refused[source.name] = error
                if error.status not in (404, 410):
                    self.blame(source.name, str(error), error.lied and source.is_peer)
                return
            if self.partial.missing and (source.is_peer or not self._peers_suffice):
                worker.run += self._take(source)

    def _why(self) -> RefusedError:
        """No source has it, or no source answers."""
        reasons = [error for name, error in self._refused.items() if not name.startswith("peer:")]
        if any(error.lied for error in reasons):
            return UnverifiedError(f"{self.where}: the mirror {next(str(error) for error in reasons if error.lied)}")
        for error in reasons:
            if error.status in (404, 410):
                return MissingError(f"{self.where}: the mirror says {error}")
        if reasons:
            return UnreachableError(f"{self.where}: the mirror {reasons[-1]}")
        return UnreachableError(f"{self.where} is not in the cache, and no peer has it")
