"""One file on its way: from several sources at once, to all who wait for it, resumable.

The file is cut into blocks of 1 MiB; each source takes a run of missing ones, writes them to the
partial file and says so in the journal beside it. Who reads it gets bytes in order while they arrive,
but the last 64 KiB only after the SHA-256 of the whole file has matched: a bad file never completes.

Bytes of peers are believed less than those of the mirror: a file that peers have part in is withheld
altogether until it is verified, if it is small and comes soon, so that a peer that lies costs the
client nothing. A larger one is sent on while it comes; if it proves bad, its connection is cut, and the
client's next request gets it from its first byte (the answer that was cut had no ETag to go on from).

After a wrong hash the bad file is kept aside and fetched again, from one source alone; when that is
right, comparing the two tells which peer lied, and only that one is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from hostos.mirror.catalogue import Known
from hostos.mirror.errors import MissingError, RefusedError, UnreachableError, UnverifiedError
from hostos.mirror.sources import Source, SourceError
from hostos.mirror.store import BLOCK, is_full, journal

WITHHELD = 64 << 10
"""Bytes at the end that nobody gets before the file is verified."""
PATIENT_SIZE = 32 << 20
PATIENT_S = 15.0
"""A file of peers up to this size (bytes) is withheld until it is verified, for so many seconds."""
MIRROR_GRACE_S = 1.5
"""How long peers have the file to themselves before the mirror joins, if they are slow."""
SLOW_RATE = 256 << 10
"""Bytes per second; if all peers together bring less, the mirror joins."""
STALL_S = 3.0
"""A peer that brings nothing for so long loses what it was to bring to another source,"""
CRAWL_RATE = 32 << 10
"""and so does one below this rate (bytes per second), if the mirror works."""
PEERS_AT_ONCE = 4
TICK_S = 0.1
MAX_RUN = 16
"""Blocks a source takes at once if there are others."""
MIRROR_ATTEMPTS = 3
PAUSE_S = 0.5

_MISSING, _TAKEN, _DONE = 0, 1, 2


class RestartedError(Exception):
    """Bytes that a reader has got already were wrong."""


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
    received: int = 0
    run: list[int] = field(default_factory=list)
    task: asyncio.Task[None] = field(init=False)


@dataclass(eq=False)
class Download:
    """`confirm` is asked after the hash matched, and raises UnverifiedError if that isn't enough;
    `finished` takes the file over; `blame(source name, reason, lied)` hears what sources did."""

    known: Known
    partial: Path
    sources: Callable[[], Sources]
    finished: Callable[[Path], Path]
    confirm: Callable[[Path], Awaitable[None]]
    blame: Callable[[str, str, bool], None]
    verified: bool = False
    error: RefusedError | None = None
    generation: int = 0
    """Grows when it has to begin again."""
    tainted: bool = False
    """Has a peer brought any of it?"""

    def __post_init__(self) -> None:
        count = -(-self.known.size // BLOCK)
        self._state = bytearray(count)
        self._have = [0] * count
        self._from: list[set[str]] = [set() for _ in range(count)]
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._began = time.monotonic()
        self._changed = asyncio.Event()
        self._workers: list[Worker] = []
        self._looking: asyncio.Future[list[Source]] | None = None
        self._mirror_works = False
        self._refused: dict[str, SourceError] = {}
        self._file = -1
        self._journal = -1
        self._suspect: Path | None = None
        self._suspect_from: list[set[str]] = []
        self.task: asyncio.Task[None] | None = None

    # --- readers ---

    @property
    def size(self) -> int:
        return self.known.size

    @property
    def available(self) -> int:
        """How many bytes from the start may be sent on."""
        if self.verified:
            return self.size
        young = time.monotonic() - self._began < PATIENT_S
        if self.size <= PATIENT_SIZE and young and self.tainted:
            return 0
        return max(0, min(self._hashed, self.size - WITHHELD))

    async def wait(self, beyond: int, generation: int | None = None) -> int:
        """How many bytes there are, once these are more than `beyond` or all.

        Raises what ended the download (RefusedError), or RestartedError if bytes that were given out
        in this `generation` (None: none yet) have proved wrong.
        """
        while True:
            if generation is not None and self.generation != generation:
                raise RestartedError
            if self.error is not None:
                raise self.error
            if self.verified or self.available > beyond:
                return self.available
            changed = self._changed
            with contextlib.suppress(asyncio.TimeoutError):
                # Not only changes count: patience ends, too.
                await asyncio.wait_for(changed.wait(), PATIENT_S / 4)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- the work ---

    async def run(self) -> None:
        """Fetch it. Never raises but for cancellation: `verified` or `error` tells."""
        try:
            await self._open()
            await self._fetch_and_check()
        except RefusedError as error:
            self.error = error
        except OSError as error:
            status, text = (507, "the cache's disk is full") if is_full(error) else (500, f"the cache: {error}")
            self.error = RefusedError(status, text)
        finally:
            for worker in self._workers:
                worker.task.cancel()
            for descriptor in (self._file, self._journal):
                if descriptor >= 0:
                    os.close(descriptor)
            self._file = self._journal = -1
            if self._suspect:
                self._suspect.unlink(missing_ok=True)
            if not self.verified and self.error is None:
                self.error = UnreachableError("the cache is stopping", 503)
            self._notify()

    async def _fetch_and_check(self) -> None:
        try:
            await self._gather(self.sources())
            if not await self._is_right():
                await self._fetch_again()
            await self.confirm(self.partial)
        except UnverifiedError:
            self.partial.unlink(missing_ok=True)
            journal(self.partial).unlink(missing_ok=True)
            raise
        self.verified = True
        self._notify()
        # Who waits has it; that it also survives a power cut is our own business.
        await asyncio.to_thread(os.fdatasync, self._file)
        self.partial = self.finished(self.partial)
        if self._suspect:
            for name in await asyncio.to_thread(self._find_liars, self.partial, self._suspect):
                self.blame(name, f"sent wrong bytes for {self.known.location}", True)

    async def _open(self) -> None:
        self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        known = self._read_journal()
        os.truncate(self._file, self.size)
        self._journal = os.open(journal(self.partial), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        for number, names in known.items():
            self._state[number], self._have[number], self._from[number] = _DONE, self._length(number), names
            self.tainted = self.tainted or any(name.startswith("peer:") for name in names)
        await self._advance()

    def _read_journal(self) -> dict[int, set[str]]:
        found = {}
        try:
            lines = journal(self.partial).read_text().splitlines()
        except OSError:
            return {}
        for line in lines:
            number, *names = line.split()
            if number.isdigit() and int(number) < len(self._state) and names:
                found[int(number)] = set(names)
        return found

    def _length(self, number: int) -> int:
        return min(BLOCK, self.size - number * BLOCK)

    @property
    def _complete(self) -> bool:
        return self._state.count(_DONE) == len(self._state)

    # --- several sources ---

    async def _gather(self, sources: Sources, *, one_by_one: bool = False) -> None:
        """Returns when all blocks are there. Raises RefusedError if no source is left.

        Peers begin; the mirror joins when there are none (left), or when they are slow.
        """
        peers, mirrors = list(sources.peers), list(sources.mirrors)
        if sources.more_peers is not None and not self._complete:
            self._looking = asyncio.ensure_future(sources.more_peers())
        attempts = 0
        not_before = began = time.monotonic()
        try:
            while not self._complete:
                now = time.monotonic()
                self._reap()
                if self._looking and self._looking.done():
                    peers += self._looking.result()
                    self._looking = None
                busy_peers = [worker for worker in self._workers if worker.source.is_peer]
                busy_mirror = len(busy_peers) < len(self._workers)
                while peers and len(busy_peers) < PEERS_AT_ONCE:
                    busy_peers.append(self._start(peers.pop(0), alone=one_by_one))
                self._drop_stalled(busy_peers, now)
                slow = now - began > MIRROR_GRACE_S and self._are_slow(busy_peers, now)
                if mirrors and not busy_mirror and (not busy_peers or slow) and now >= not_before:
                    failed = self._refused.pop(mirrors[0].name, None)
                    attempts += failed is not None
                    if failed and (failed.lied or failed.status >= 400 or attempts >= MIRROR_ATTEMPTS):
                        self._refused[mirrors.pop(0).name] = failed
                        attempts = 0
                        continue
                    pause = PAUSE_S * attempts if failed else 0.0
                    self._start(mirrors[0], alone=one_by_one, after=pause)
                elif not self._workers and not peers and not mirrors and self._looking is None:
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
            crawls = now - worker.began > STALL_S and worker.received < CRAWL_RATE * (now - worker.began)
            if now - worker.last > STALL_S or (crawls and self._mirror_works):
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

    def _are_slow(self, workers: list[Worker], now: float) -> bool:
        return sum(worker.received / (now - worker.began + 0.01) for worker in workers) < SLOW_RATE

    def _start(self, source: Source, *, alone: bool, after: float = 0.0) -> Worker:
        now = time.monotonic() + after
        worker = Worker(source, now, now)
        worker.task = asyncio.create_task(self._work(worker, alone, after))
        self._workers.append(worker)
        return worker

    def _reap(self) -> None:
        for worker in [worker for worker in self._workers if worker.task.done()]:
            self._workers.remove(worker)
            for number in worker.run:
                if self._state[number] == _TAKEN:
                    self._state[number] = _MISSING
            error = None if worker.task.cancelled() else worker.task.exception()
            if error is not None:
                raise error

    def _why(self) -> RefusedError:
        """No source has it, or no source answers."""
        reasons = [error for name, error in self._refused.items() if not name.startswith("peer:")]
        where = self.known.location
        if any(error.lied for error in reasons):
            return UnverifiedError(f"{where}: the mirror {next(str(error) for error in reasons if error.lied)}")
        for error in reasons:
            if error.status in (404, 410):
                return MissingError(f"{where}: the mirror says {error}")
        if reasons:
            return UnreachableError(f"{where}: the mirror {reasons[-1]}")
        return UnreachableError(f"{where} is not in the cache, and no peer has it")

    async def _work(self, worker: Worker, alone: bool, after: float) -> None:
        await asyncio.sleep(after)
        source = worker.source
        while worker.run or self._take(worker, alone):
            first = worker.run[0]
            offset = first * BLOCK + self._have[first]
            end = worker.run[-1] * BLOCK + self._length(worker.run[-1])
            try:
                async with contextlib.aclosing(source.read(offset, end)) as parts:
                    async for data in parts:
                        worker.last = time.monotonic()
                        worker.received += len(data)
                        self._mirror_works = self._mirror_works or not source.is_peer
                        await self._put(offset, data, worker)
                        offset += len(data)
            except SourceError as error:
                self._refused[source.name] = error
                if error.status not in (404, 410):
                    self.blame(source.name, str(error), error.lied and source.is_peer)
                return

    def _take(self, worker: Worker, alone: bool) -> bool:
        """Give the worker a run of missing blocks; False if there are none."""
        first = self._state.find(bytes([_MISSING]))
        if first < 0:
            return False
        missing = self._state.count(_MISSING)
        most = missing if alone or not self._others(worker) else min(MAX_RUN, max(1, missing // 4))
        number = first
        while number < len(self._state) and number - first < most and self._state[number] == _MISSING:
            self._state[number] = _TAKEN
            worker.run.append(number)
            number += 1
        return True

    def _others(self, worker: Worker) -> bool:
        return worker.source.is_peer or self._looking is not None or len(self._workers) > 1

    async def _put(self, offset: int, data: bytes, worker: Worker) -> None:
        """Write what came; blocks that became whole are journalled."""
        view = memoryview(data)
        while view:
            number = worker.run[0]
            room = number * BLOCK + self._length(number) - offset
            part = view[:room]
            written = 0
            while written < len(part):
                written += os.pwrite(self._file, part[written:], offset + written)
            if offset == self._hashed:
                self._hash.update(part)
                self._hashed += len(part)
            self._have[number] += len(part)
            self._from[number].add(worker.source.name)
            self.tainted = self.tainted or worker.source.is_peer
            if self._have[number] == self._length(number):
                self._state[number] = _DONE
                worker.run.pop(0)
                names = " ".join(sorted(self._from[number]))
                os.write(self._journal, f"{number} {names}\n".encode())
            offset += len(part)
            view = view[len(part) :]
        await self._advance()
        self._notify()

    async def _advance(self) -> None:
        """Hash what has become contiguous with what is hashed."""
        while self._hashed < self.size:
            number = self._hashed // BLOCK
            until = number * BLOCK + self._have[number]
            if until <= self._hashed:
                return
            start = self._hashed
            data = await asyncio.to_thread(os.pread, self._file, until - start, start)
            if not data:
                return
            if self._hashed != start:
                continue  # another one was faster
            self._hash.update(data)
            self._hashed += len(data)

    # --- right or wrong ---

    async def _is_right(self) -> bool:
        await self._advance()
        return self._hashed == self.size and self._hash.hexdigest() == self.known.sha256

    async def _fetch_again(self) -> None:
        """The hash was wrong: from the beginning, from one source alone; the mirror first, which may have
        been changing, then peers that are not to blame. Raises RefusedError."""
        problem: RefusedError | None = None
        authors: set[str] = set().union(*self._from)
        self._blame_alone(authors)
        self._suspect = self.partial.with_name(f"{self.partial.name}.suspect")
        self.partial.replace(self._suspect)
        self._suspect_from = self._from
        sources = self.sources()
        for source in (*sources.mirrors, *sources.peers):
            if source.is_peer and authors == {source.name}:
                continue
            await self._restart()
            one = Sources([source], []) if source.is_peer else Sources([], [source])
            try:
                await self._gather(one, one_by_one=True)
            except RefusedError as error:
                problem = problem or error
                continue
            if await self._is_right():
                return
            self._blame_alone({source.name})
        raise problem or UnverifiedError(f"{self.known.location}: what arrives has not the SHA-256 that is signed")

    def _blame_alone(self, authors: set[str]) -> None:
        if len(authors) == 1 and (author := next(iter(authors))).startswith("peer:"):
            self.blame(author, f"sent wrong bytes for {self.known.location}", True)

    async def _restart(self) -> None:
        for descriptor in (self._file, self._journal):
            os.close(descriptor)
        self._file = self._journal = -1
        self.partial.unlink(missing_ok=True)
        journal(self.partial).unlink(missing_ok=True)
        count = len(self._state)
        self._state, self._have = bytearray(count), [0] * count
        self._from = [set() for _ in range(count)]
        self._hash, self._hashed, self.tainted = hashlib.sha256(), 0, False
        self._refused.clear()
        self.generation += 1
        self._notify()
        await self._open()

    def _find_liars(self, good: Path, bad: Path) -> set[str]:
        """Peers whose blocks of the bad file differ from the good one."""
        liars: set[str] = set()
        with good.open("rb") as right, bad.open("rb") as wrong:
            for names in self._suspect_from:
                if right.read(BLOCK) != wrong.read(BLOCK) and len(names) == 1:
                    liars |= {name for name in names if name.startswith("peer:")}
        return liars
