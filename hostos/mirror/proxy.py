"""The HTTP proxy for package managers: aiohttp's server, and what it does with a request.

aiohttp's parser (llhttp) is strict: requests with both Content-Length and Transfer-Encoding, with bare
line feeds or with control characters in headers are refused there. Bodies of requests are never read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from aiohttp import web

from hostos.mirror import answer
from hostos.mirror.apt import AptArchives
from hostos.mirror.contents import Contents, Wanted
from hostos.mirror.documents import Document
from hostos.mirror.errors import RefusedError
from hostos.mirror.ledger import Ledger
from hostos.mirror.location import parse_target
from hostos.mirror.pacman import PacmanRepositories
from hostos.mirror.upstreams import Upstreams

AHEAD = 4
AHEAD_SIZE = 4 << 20
MOST_AHEAD = 1000
"""So many files that a client asks for next are begun, if they have no more than these bytes."""


@dataclass
class Proxy:
    """`upstreams`: the archives as they are configured now."""

    upstreams: Callable[[], Upstreams]
    apt: AptArchives
    pacman: PacmanRepositories
    contents: Contents
    ledger: Ledger
    log: Callable[[str], None]
    in_flight: int = 0
    _ahead: set[str] = field(default_factory=set)
    """SHA-256 of what was begun before its turn, and has not been asked for yet."""
    _beginning: set[asyncio.Task[None]] = field(default_factory=set)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.in_flight += 1
        archive = "none"
        try:
            if request.method not in ("GET", "HEAD"):
                raise RefusedError(405, f"{request.method} is not for a package cache")
            if "Transfer-Encoding" in request.headers or request.headers.get("Content-Length", "0") != "0":
                raise RefusedError(400, "a request for a package has no body")
            location = parse_target(request.raw_path)
            upstreams = self.upstreams()
            found: Document | Wanted
            if (repository := upstreams.find_pacman(location)) is not None:
                archive = repository.base
                found = await self.pacman.resolve(location, repository)
            elif entries := upstreams.find_apt(location):
                archive = entries[0].base
                found = await self.apt.resolve(location, entries)
            else:
                host = location.partition("/")[0]
                raise RefusedError(403, f"{host} is none of the cached archives: hostos mirror import")
            return await self._answer(request, archive, location, found)
        except RefusedError as error:
            if error.status != 416:
                self.ledger.count(archive, requests=1, refused=1)
            if error.status in (502, 507):
                self.log(f"refused: {error.reason}")
            return answer.refused(request, error)
        finally:
            self.in_flight -= 1

    def _look_ahead(self, request: web.BaseRequest) -> None:
        """Begin what the client has asked for behind this request: apt sends ten at once, and would else wait for
        the mirror's answer once for each. Only while files are missing, as looking is not free. (aiohttp keeps them,
        parsed, but has no public name for them.)"""
        for message, _ in islice(getattr(request.protocol, "_messages", ()), AHEAD):
            if message.method == "GET" and len(self._beginning) < AHEAD:
                task = asyncio.create_task(self._begin(message.path))
                self._beginning.add(task)
                task.add_done_callback(self._beginning.discard)

    async def _begin(self, target: str) -> None:
        # What is wrong with it is said when it has its turn.
        with contextlib.suppress(RefusedError):
            location = parse_target(target)
            if entries := self.upstreams().find_apt(location):
                found = await self.apt.resolve(location, entries)
                if isinstance(found, Wanted) and found.known.size <= AHEAD_SIZE:
                    digest = found.known.sha256
                    if digest not in self.contents.active and self.contents.held(found.known) is None:
                        self.contents.download(found)
                        if len(self._ahead) >= MOST_AHEAD:
                            self._ahead.clear()  # of clients that have gone away
                        self._ahead.add(digest)

    async def _answer(
        self, request: web.BaseRequest, archive: str, location: str, found: Document | Wanted
    ) -> web.StreamResponse:
        def sent(count: int) -> None:
            self.ledger.count(archive, served=count)

        if isinstance(found, Document):
            self.ledger.count(archive, requests=1)
            return await answer.document(request, found, sent)
        known = found.known
        path = self.contents.held(known)
        fetched_for_it = known.sha256 in self._ahead
        self._ahead.discard(known.sha256)
        if path is None or fetched_for_it:
            self._look_ahead(request)
        if path is not None:
            self.ledger.count(archive, requests=1, **{"misses" if fetched_for_it else "hits": 1})
            self.ledger.use(known.sha256)
            said = answer.FileAnswer(request, known.sha256, known.size, location, path.stat().st_mtime)
            return await answer.stored(said, path, sent)
        said = answer.FileAnswer(request, known.sha256, known.size, location, None)
        if request.method == "HEAD":
            self.ledger.count(archive, requests=1)
            return said.response(None)
        download = self.contents.download(found)
        self.ledger.count(archive, requests=1, misses=1)
        response = await answer.arriving(said, download, sent)
        self.ledger.use(known.sha256)
        return response
