"""One file on its way: from several sources at once, to all who wait for it, resumable.

Who reads it gets bytes in order while they arrive, but the last 64 KiB only after the SHA-256 of the
whole file has matched: a bad file never completes.

Bytes of peers are believed less than those of the mirror: a file that peers have part in is withheld
altogether until it is verified, if it is small and comes soon, so that a peer that lies costs the
client nothing. A larger one is sent on while it comes; if it proves bad, its connection is cut, and the
client's next request gets it from its first byte (the answer that was cut had no ETag to go on from).

After a wrong hash the bad file is kept aside and fetched again, from one source alone; when that is
right, comparing the two tells which peer lied, and only that one is dropped. Who has been given nothing
but what they have in common, such as what the mirror brought before there was a peer, just goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from hostos.mirror.catalogue import Known
from hostos.mirror.errors import RefusedError, UnreachableError, UnverifiedError
from hostos.mirror.gathering import Blame, Gathering, Sources
from hostos.mirror.partial import Partial
from hostos.mirror.store import BLOCK, is_full

WITHHELD = 64 << 10
"""Bytes at the end that nobody gets before the file is verified."""
STEP = 16 << 10
SECOND_OPINIONS = 2
"""Peers that are asked for all of a file after peers have lied, before the mirror is."""
PATIENT_SIZE = 32 << 20
PATIENT_S = 15.0
"""A file of peers up to this size (bytes) is withheld until it is verified, for so many seconds."""


class RestartedError(Exception):
    """Bytes that a reader has got already were wrong."""


@dataclass(eq=False)
class Download:
    """`path`: where it is, first in part and then in the store; `confirm` is asked after the hash matched, and
    raises UnverifiedError if that isn't enough; `finished` takes the file over and says where it is then."""

    known: Known
    path: Path
    sources: Callable[[], Sources]
    finished: Callable[[Path], Path]
    confirm: Callable[[Path], Awaitable[None]]
    blame: Blame
    verified: bool = False
    error: RefusedError | None = None
    generation: int = 0
    """Grows when it has to begin again."""

    def __post_init__(self) -> None:
        self._partial = Partial(self.path, self.known.size)
        self._began = time.monotonic()
        self._agreed = 0
        self._changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    # --- readers ---

    @property
    def size(self) -> int:
        return self.known.size

    @property
    def tainted(self) -> bool:
        """Has a peer brought any of it?"""
        return self._partial.tainted

    @property
    def available(self) -> int:
        """How many bytes from the start may be sent on."""
        if self.verified:
            return self.size
        young = time.monotonic() - self._began < PATIENT_S
        if self.size <= PATIENT_SIZE and young and self.tainted:
            return 0
        return max(0, min(self._partial.hashed, self.size - WITHHELD))

    async def wait(self, beyond: int, generation: int | None = None) -> int:
        """How many bytes there are, once these are more than `beyond` or all.

        Raises what ended the download (RefusedError), or RestartedError if the `beyond` bytes that were given
        out in this `generation` (None: none yet) have proved wrong, or may be.
        """
        while True:
            if self.error is not None:
                raise self.error
            if generation is not None and self.generation != generation:
                if self.size > PATIENT_SIZE or (self.verified and beyond > self._agreed):
                    raise RestartedError
            elif self.available > beyond:
                return self.available
            if self.verified:
                return self.size
            changed = self._changed
            try:
                # Not only changes count: patience ends, too.
                async with asyncio.timeout(PATIENT_S / 4):
                    await changed.wait()
            except TimeoutError:
                pass

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- the work ---

    async def run(self) -> None:
        """Fetch it. Never raises but for cancellation: `verified` or `error` tells."""
        suspect = self.path.with_name(f"{self.path.name}.suspect")
        try:
            await self._partial.open()
            await self._fetch_and_check(suspect)
        except RefusedError as error:
            self.error = error
        except OSError as error:
            status, text = (507, "the cache's disk is full") if is_full(error) else (500, f"the cache: {error}")
            self.error = RefusedError(status, text)
        finally:
            self._partial.close()
            suspect.unlink(missing_ok=True)
            if not self.verified and self.error is None:
                self.error = UnreachableError("the cache is stopping", 503)
            self._notify()

    async def _fetch_and_check(self, suspect: Path) -> None:
        wrong: list[set[str]] = []
        try:
            await self._gather(self.sources())
            if not await self._partial.has(self.known.sha256):
                wrong = self._partial.authors
                await self._fetch_again(suspect)
            await self.confirm(self.path)
        except UnverifiedError:
            self._partial.remove()
            raise
        self.verified = True
        self._notify()
        # Who waits has it; that it also survives a power cut is our own business.
        await asyncio.to_thread(self._partial.sync)
        self.path = self.finished(self.path)
        if wrong:
            for name in await asyncio.to_thread(_find_liars, self.path, suspect, wrong):
                self.blame(name, f"sent wrong bytes for {self.known.location}", True)

    async def _gather(self, sources: Sources, *, one_by_one: bool = False) -> None:
        gathering = Gathering(self._partial, self.known.location, self.blame, self._notify, one_by_one)
        await gathering.run(sources)

    async def _fetch_again(self, suspect: Path) -> None:
        """The hash was wrong: from the beginning, from one source alone. If only peers brought it, two of them
        first, if they are quick; else the mirror, which may have been changing. Raises RefusedError."""
        problem: RefusedError | None = None
        authors: set[str] = set().union(*self._partial.authors)
        self._blame_alone(authors)
        self.path.replace(suspect)
        sources = self.sources()
        peers = [source for source in sources.peers if authors != {source.name}]
        first = SECOND_OPINIONS if all(name.startswith("peer:") for name in authors) else 0
        for source in (*peers[:first], *sources.mirrors, *peers[first:]):
            await self._partial.restart()
            self.generation += 1
            self._notify()
            one = Sources([source], []) if source.is_peer else Sources([], [source])
            try:
                await self._gather(one, one_by_one=True)
            except RefusedError as error:
                problem = problem or error
                continue
            if await self._partial.has(self.known.sha256):
                self._agreed = await asyncio.to_thread(_agreement, self.path, suspect)
                return
            self._blame_alone({source.name})
        raise problem or UnverifiedError(f"{self.known.location}: what arrives has not the SHA-256 that is signed")

    def _blame_alone(self, authors: set[str]) -> None:
        if len(authors) == 1 and (author := next(iter(authors))).startswith("peer:"):
            self.blame(author, f"sent wrong bytes for {self.known.location}", True)


def _agreement(good: Path, bad: Path) -> int:
    """In how many bytes from the start, at least, two files are the same."""
    same = 0
    with good.open("rb") as right, bad.open("rb") as wrong:
        while (data := right.read(STEP)) and data == wrong.read(STEP):
            same += len(data)
    return same


def _find_liars(good: Path, bad: Path, authors: list[set[str]]) -> set[str]:
    """Peers whose blocks of the bad file differ from the good one; `authors` of each block of the bad one."""
    liars: set[str] = set()
    with good.open("rb") as right, bad.open("rb") as wrong:
        for names in authors:
            if right.read(BLOCK) != wrong.read(BLOCK) and len(names) == 1:
                liars |= {name for name in names if name.startswith("peer:")}
    return liars
