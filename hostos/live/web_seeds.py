"""Images from plain HTTP servers with ranges (BEP 19): verified like everything else, so a swarm of nobody boots.

A web seed is a directory laid out as a store is, at any URL:

    images/<image hash>/   manifest.json, layers/0.torrent …, trace.json
    layers/<layer hash>/   the layer's file, under its torrent's name

So `layers/<layer hash>/` is a web seed of the layer's torrent for every client that knows BEP 19. A server
is believed nothing: metadata is proved by the image's hash, each piece by the layer's tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from hostos.errors import UserError, failure
from hostos.live.manifest import MAX_MANIFEST, Manifest
from hostos.live.pieces import PieceHashes
from hostos.live.servers import PAUSES, Servers, Wanted
from hostos.live.torrents import (
    MANIFEST_FILE,
    MAX_LAYER_TORRENT,
    TRACE_FILE,
    ImageBundle,
    layer_path,
    verify_files,
)
from hostos.live.trace import MAX_TRACE
from hostos.live.url import Url

AHEAD = 12
"""Most pieces under way that nobody waits for; what somebody waits for then finds a connection free."""


class WebSeeds(Servers):
    """Those that may be asked for one image."""

    kind = "web seed"


async def fetch_image(urls: Iterable[Url], image: str, log: Callable[[str], None]) -> ImageBundle:
    """The image's metadata, from the first of these servers that has it, proved. Raises UserError: none has.

    The caller sets the time limit.
    """
    why = []
    for url in urls:
        servers = WebSeeds([url], log)
        try:
            return await _fetch_image(servers, image)
        except UserError as error:
            why.append(f"{url}: {error.message}")
            log(f"web seed {url}: image {image[:16]}…: {error.message}")
        finally:
            with trio.CancelScope(shield=True):
                await servers.close()
    raise failure(
        f"no web seed had image {image[:16]}…; {'; '.join(why)}", "is it there (hostos image export)? Name another one"
    )


async def _fetch_image(servers: WebSeeds, image: str) -> ImageBundle:
    files: dict[str, bytes] = {}

    async def fetch(path: str, limit: int, *, optional: bool = False) -> None:
        # What it is worth only all of them together can tell.
        wanted = Wanted(path, f"/images/{image}/{path}", limit, lambda _content: True, optional=optional)
        content = await servers.ask(wanted)
        if content is None:
            raise failure(f"{path}: {servers.all()[0].trouble}")
        if content or not optional:
            files[path] = content

    await fetch(MANIFEST_FILE, MAX_MANIFEST)
    layers = range(len(Manifest.parse(files[MANIFEST_FILE]).layers))
    try:
        async with trio.open_nursery() as nursery:
            for index in layers:
                nursery.start_soon(fetch, layer_path(index), MAX_LAYER_TORRENT)
    except* UserError as group:
        raise _first(group) from None
    await fetch(TRACE_FILE, MAX_TRACE, optional=True)
    return verify_files(image, files)


def _first(group: BaseExceptionGroup[UserError]) -> UserError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, UserError)
    return error


@dataclass
class _Flight:
    """A piece that is being fetched. `awaited`: somebody waits for it; `running`: its turn has come."""

    awaited: bool
    running: bool = False


class WebPieces:
    """The pieces of one layer, from web seeds. `path`: of its file, below theirs.

    `deliver(piece, data)` is called with each piece that came and was proved, `lost(piece)` for one fetched
    ahead that nobody had: whoever reads it asks again.
    """

    def __init__(
        self,
        servers: WebSeeds,
        path: str,
        size: int,
        hashes: PieceHashes,
        deliver: Callable[[int, bytes], None],
        lost: Callable[[int], None],
    ) -> None:
        self.servers = servers
        self._path, self._size, self._hashes = path, size, hashes
        self._deliver, self._lost = deliver, lost
        self._under_way: dict[int, _Flight] = {}
        self._ahead = trio.CapacityLimiter(AHEAD)
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    async def close(self) -> None:
        self._nursery = None
        self._under_way.clear()
        await self.servers.close()

    def fetch(self, piece: int, *, ahead: bool) -> None:
        """Have it fetched, unless it is under way. `ahead`: nobody waits for it yet."""
        if self._nursery is None:
            return
        if (flight := self._under_way.get(piece)) is not None:
            flight.awaited |= not ahead
            if ahead or flight.running:
                return
            # One that waits for its turn among those fetched ahead is overtaken.
        flight = self._under_way[piece] = _Flight(awaited=not ahead, running=not ahead)
        self._nursery.start_soon(self._fetch, piece, flight)

    def forget(self, piece: int) -> None:
        """It came from elsewhere: ask no more."""
        self._under_way.pop(piece, None)

    async def _fetch(self, piece: int, flight: _Flight) -> None:
        start = piece * self._hashes.piece_size
        length = min(self._hashes.piece_size, self._size - start)
        wanted = Wanted(
            f"piece {piece}", self._path, length, lambda data: self._hashes.proves(piece, data), span=(start, length)
        )

        def current() -> bool:
            return self._under_way.get(piece) is flight and not self.servers.closed

        if not flight.awaited:
            async with self._ahead:
                flight.running = True
                data = await self.servers.ask(wanted) if current() else None
        else:
            data = await self.servers.ask(wanted)
        pause = PAUSES[0]
        while data is None and flight.awaited and current():
            await trio.sleep(pause)
            pause = min(2 * pause, PAUSES[1])
            data = await self.servers.ask(wanted)
        if not current():
            return
        del self._under_way[piece]
        if data is not None:
            self._deliver(piece, data)
        else:
            self._lost(piece)
