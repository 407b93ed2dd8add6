"""A file by what is signed of it: from the store, or fetched, once for all who ask at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import aiohttp

from hostos.mirror.catalogue import Known
from hostos.mirror.download import Download
from hostos.mirror.errors import UnreachableError
from hostos.mirror.gathering import Sources
from hostos.mirror.ledger import Ledger
from hostos.mirror.peers import Peers
from hostos.mirror.rate import Rate
from hostos.mirror.sources import MIRROR_TIMEOUT, Source
from hostos.mirror.store import Store


@dataclass(frozen=True)
class Wanted:
    """`urls`: where mirrors have the file; `archive`: for the statistics; `asked`: by somebody here;
    `confirm`: what besides the hash has to be right (raises UnverifiedError); `peers`: may they be asked?"""

    known: Known
    urls: tuple[str, ...]
    archive: str
    asked: bool = True
    confirm: Callable[[Path], Awaitable[None]] | None = None


class Finder(Protocol):
    """Looks for peers that have a file: `dht.Finder`, whose module is only imported when it is used."""

    async def find(self, sha256: str) -> set[tuple[str, int]]: ...


async def _nothing(_: Path) -> None:
    return None


@dataclass
class Contents:
    """`verified` hears of each file that has been verified and is in the store."""

    store: Store
    ledger: Ledger
    peers: Peers
    session: aiohttp.ClientSession
    rate: Rate
    log: Callable[[str], None]
    offline: bool = False
    proxy: str = ""
    finder: Finder | None = None
    verified: Callable[[Known], None] = lambda _: None
    active: dict[str, Download] = field(default_factory=dict)

    def held(self, known: Known) -> Path | None:
        """The file, if it is in the store."""
        size = self.store.size(known.sha256)
        if size is None:
            return None
        if size != known.size:
            self.store.remove(known.sha256)  # a damaged disk: what was verified had another size
            return None
        return self.store.path(known.sha256)

    def download(self, wanted: Wanted) -> Download:
        """The running download of the file, or a new one. Raises RefusedError if it can't begin."""
        sha256 = wanted.known.sha256
        if (running := self.active.get(sha256)) is not None and running.error is None:
            return running
        if self.offline:
            raise UnreachableError(f"{wanted.known.location} is not in the cache, which is offline")
        self.store.make_room(wanted.known.size)
        made = Download(
            wanted.known,
            self.store.partials / sha256,
            lambda: self._sources(wanted),
            lambda partial: self._finished(partial, wanted),
            wanted.confirm or _nothing,
            self._blame,
        )
        self.active[sha256] = made
        made.task = asyncio.create_task(self._run(made))
        return made

    async def obtain(self, wanted: Wanted) -> Path:
        """The file, when it is verified. Raises RefusedError."""
        if (path := self.held(wanted.known)) is not None:
            return path
        download = self.download(wanted)
        assert download.task
        await asyncio.shield(download.task)
        if download.error:
            raise download.error
        return download.path

    async def _run(self, download: Download) -> None:
        try:
            await download.run()
        finally:
            if self.active.get(download.known.sha256) is download:
                del self.active[download.known.sha256]
        if download.error and download.error.status not in (404,):
            self.log(f"{download.known.location}: {download.error.reason}")

    def _sources(self, wanted: Wanted) -> Sources:
        sha256, size = wanted.known.sha256, wanted.known.size

        def by_mirror(count: int) -> None:
            self.ledger.count(wanted.archive, from_mirror=count)

        def by_peer(count: int) -> None:
            self.ledger.count(wanted.archive, from_peers=count)

        peers = [self.peers.source(address, sha256, size, by_peer) for address in self.peers.usable()]
        mirrors = [
            Source(url, url, size, self.session, MIRROR_TIMEOUT, self.rate, by_mirror, proxy=self.proxy)
            for url in wanted.urls
        ]
        if self.finder is None:
            return Sources(peers, mirrors)
        finder = self.finder

        async def more_peers() -> list[Source]:
            found = self.peers.found(await finder.find(sha256))
            return [self.peers.source(address, sha256, size, by_peer) for address in found]

        return Sources(peers, mirrors, more_peers)

    def _finished(self, partial: Path, wanted: Wanted) -> Path:
        path = self.store.adopt(partial, wanted.known.sha256, wanted.known.location, asked=wanted.asked)
        self.verified(wanted.known)
        return path

    def _blame(self, name: str, reason: str, lied: bool) -> None:
        if name.startswith("peer:"):
            self.peers.failed(name.removeprefix("peer:"), reason, lied=lied)

    async def close(self) -> None:
        """End what is running; what has arrived of it is kept."""
        tasks = [download.task for download in self.active.values() if download.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
