"""From an image's hash to its verified manifest and layers.

The metadata comes from the cache, from a bundle somebody handed over, or from peers; in each case
it is proved against the hash before anything of it is used.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import libtorrent as lt
import trio

from hostos.errors import UserError, failure
from hostos.live import index as indexes
from hostos.live.blocks import Blocks
from hostos.live.cid import looks_like_cid
from hostos.live.ipfs_image import IpfsImage
from hostos.live.ipfs_image import load as load_ipfs
from hostos.live.ledger import Endpoint
from hostos.live.session import Swarm
from hostos.live.shared import Shared
from hostos.live.source import SourceError
from hostos.live.torrent_source import TorrentSource, from_metadata
from hostos.live.torrents import (
    IMAGE_NAME,
    MANIFEST_FILE,
    MAX_IMAGE_SIZE,
    OPTIONAL_FILES,
    ImageBundle,
    check_hash,
    layer_path,
    magnet,
    parse_web_seed,
    verify_bundle,
    verify_files,
)
from hostos.live.url import Url
from hostos.live.web_seeds import fetch_image

RESOLVE_LIMIT = 10.0
"""Seconds for looking up a peer's name."""


async def resolve(peers: Iterable[str]) -> list[Endpoint]:
    """Addresses of `HOST:PORT` peers (as `parse_peer` writes them), in order, without repetition.

    A name that can't be resolved is left out. Nobody is contacted but the system's resolver.
    """
    found: dict[Endpoint, None] = {}
    for peer in peers:
        host, _, port = peer.rpartition(":")
        with trio.move_on_after(RESOLVE_LIMIT):
            try:
                answers = await trio.socket.getaddrinfo(host.strip("[]"), int(port), type=trio.socket.SOCK_STREAM)
            except OSError:
                continue
            for *_, address in answers[:4]:
                found[(str(address[0]), int(address[1]))] = None
    return list(found)


class Images:
    """Verified image metadata, kept in `directory` by hash (each use proves it again). Of an index the
    image for `machine` (an architecture) is meant."""

    def __init__(self, swarm: Swarm, nursery: trio.Nursery, directory: Path, blocks: Blocks, machine: str = "") -> None:
        self.swarm, self._nursery, self._directory, self._blocks = swarm, nursery, directory, blocks
        self._machine = machine or os.uname().machine
        self.shared = Shared(swarm, directory)
        # Not among the images: it has no layers to keep.
        self._indexes = directory.with_name("indexes")

    async def load(
        self,
        image: str,
        peers: Iterable[str] = (),
        *,
        bundle: Mapping[str, Any] | None = None,
        deadline: float = 30.0,
        web: Sequence[str] = (),
    ) -> ImageBundle | IpfsImage:
        """The image with this hash (64 hex digits), which may be an index's, or CID; `peers` are then
        addresses of gateways.

        `web`: addresses of web seeds; `deadline`: seconds for fetching it from all these. Raises UserError: no
        such image there, nobody answered (the message names who was asked), or what came is not an image.
        """
        if looks_like_cid(image):
            return await load_ipfs(self._blocks, image, peers, deadline)
        check_hash(image)
        if bundle is not None:
            given = verify_bundle(bundle, image=image)
            await trio.to_thread.run_sync(self._keep, given)
            return given
        kept: ImageBundle | None = await trio.to_thread.run_sync(self._kept, image)
        if kept:
            return kept
        began = time.monotonic()
        servers = [parse_web_seed(url) for url in web]
        got: ImageBundle | indexes.Index | None = await trio.to_thread.run_sync(self._kept_index, image)
        if got is None:
            got = await self._fetch_from(image, tuple(peers), servers, deadline)
        if isinstance(got, indexes.Index):
            await trio.to_thread.run_sync(self._keep_index, image, got)
            left = max(1.0, deadline - (time.monotonic() - began))
            return await self._listed(got, tuple(peers), servers, left)
        await trio.to_thread.run_sync(self._keep, got)
        return got

    async def _listed(
        self, index: indexes.Index, peers: tuple[str, ...], web: list[Url], deadline: float
    ) -> ImageBundle:
        """The image of `index` for this machine."""
        image = check_hash(index.choose(self._machine))
        kept: ImageBundle | None = await trio.to_thread.run_sync(self._kept, image)
        if kept:
            return kept
        found = await self._fetch_from(image, peers, web, deadline)
        if isinstance(found, indexes.Index):
            raise UserError(f"index {index.name} names another index for {self._machine}", "it is damaged")
        await trio.to_thread.run_sync(self._keep, found)
        return found

    def _kept_index(self, image: str) -> indexes.Index | None:
        """From the cache; a damaged one is fetched again."""
        try:
            return indexes.verify(image, {indexes.INDEX_FILE: (self._indexes / image).read_bytes()})
        except (UserError, OSError):
            return None

    def _keep_index(self, image: str, index: indexes.Index) -> None:
        self._indexes.mkdir(exist_ok=True)
        new = self._indexes / f".{image}.new"
        new.write_bytes(index.to_json())
        new.rename(self._indexes / image)

    def _kept(self, image: str) -> ImageBundle | None:
        """From the cache; a damaged entry is removed."""
        place = self._directory / image
        if not place.is_dir():
            return None
        try:
            paths = [path for path in place.rglob("*") if path.is_file()]
            return verify_files(image, {path.relative_to(place).as_posix(): path.read_bytes() for path in paths})
        except (UserError, OSError):
            shutil.rmtree(place, ignore_errors=True)
            return None

    def _keep(self, bundle: ImageBundle) -> None:
        place = self._directory / bundle.image
        if place.is_dir():
            return
        # Written beside and moved, so that an interrupted write is never taken for an entry.
        new = self._directory / f".{bundle.image}.new"
        shutil.rmtree(new, ignore_errors=True)
        for path, data in bundle.files.items():
            target = new / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        new.rename(place)

    async def _fetch_from(
        self, image: str, peers: tuple[str, ...], web: list[Url], deadline: float
    ) -> ImageBundle | indexes.Index:
        """From peers and web seeds at once: whoever has it first."""
        self.shared.withdraw(image)  # what is fetched again was damaged
        if not web:
            return await self._fetch(image, peers, deadline)
        found: list[ImageBundle | indexes.Index] = []
        why: list[UserError] = []
        async with trio.open_nursery() as nursery:

            async def one(fetch: Awaitable[ImageBundle | indexes.Index]) -> None:
                try:
                    found.append(await fetch)
                    nursery.cancel_scope.cancel()
                except UserError as error:
                    why.append(error)

            async def from_web() -> ImageBundle:
                with trio.move_on_after(deadline):
                    return await fetch_image(web, image, self.swarm.log)
                raise failure(f"no web seed had image {image[:16]}… within {deadline:g} s: {', '.join(map(str, web))}")

            nursery.start_soon(one, from_web())
            if peers or self.swarm.settings.discovers:
                nursery.start_soon(one, self._fetch(image, peers, deadline))
        if not found:
            raise failure("; ".join(error.message for error in why), why[0].hint)
        return found[0]

    # --- from peers -------------------------------------------------------------------------------

    async def _fetch(self, image: str, peers: tuple[str, ...], deadline: float) -> ImageBundle | indexes.Index:
        asked = ", ".join(peers) or "no peer was named"
        if self.swarm.settings.discovers:
            asked += ", and those that " + ("the DHT" if self.swarm.settings.public else "the local network") + " knows"
        if not peers and not self.swarm.settings.discovers:
            raise UserError(
                f"image {image[:16]}… is not here and no peer is known that could have it",
                "name one: --peer HOST:PORT or --web-seed URL",
            )
        endpoints = await resolve(peers)
        if not endpoints and not self.swarm.settings.discovers:
            raise failure(f"none of the peers' names could be resolved: {asked}")
        place = self._directory / f".{image}.fetch"
        try:
            content = await self._content(image, endpoints, place, deadline, asked)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return indexes.verify(image, content) or verify_files(image, content)

    async def _content(
        self, image: str, endpoints: list[Endpoint], place: Path, deadline: float, asked: str
    ) -> dict[str, bytes]:
        """The files of the image's torrent, by path. `asked`: who is, for the message if nobody has it."""
        began = time.monotonic()
        handle = None
        with trio.move_on_after(deadline):
            handle = await self._metadata(image, endpoints, place)
        if handle is None:
            raise failure(
                f"nobody had image {image[:16]}… within {deadline:g} s; asked: {asked}",
                "is it seeded there (hostos seed status)? Name another peer with --peer HOST:PORT",
            )
        with ExitStack() as undo:
            undo.callback(self.swarm.session.remove_torrent, handle)
            info = handle.torrent_file()
            paths = check_metadata(info)
            left = max(1.0, deadline - (time.monotonic() - began))
            source = TorrentSource(self.swarm, from_metadata(info), place, endpoints, deadline=left, keep=True)
            undo.pop_all()
        try:
            # Over the connections that it has: each new one takes five round trips.
            source.start(self._nursery, handle)
            # File by file: each begins a new piece, and the one before is not padded.
            return {path: await source.read(start, size) for path, (start, size) in paths.items()}
        except SourceError as error:
            raise failure(f"image {image[:16]}…: {error.strerror}", "name another --peer HOST:PORT") from None
        finally:
            with trio.CancelScope(shield=True):
                await source.close()

    async def _metadata(self, image: str, endpoints: list[Endpoint], place: Path) -> Any:
        """libtorrent's handle of the torrent once it has its info dictionary from peers, checked against the hash.

        Nothing of the content is fetched yet, for which `place` is the directory. The caller removes the torrent.
        """
        wait = _Metadata()
        self.swarm.join(wait)
        try:
            while True:
                parameters = lt.parse_magnet_uri(magnet(image))
                parameters.save_path = str(place)
                parameters.peers = endpoints
                parameters.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
                # Nothing of it is fetched before it is known to be an image. (With no_verify_files as well, libtorrent
                # 2.1 crashes once something is fetched.)
                parameters.flags |= lt.torrent_flags.default_dont_download
                wait.handle = handle = self.swarm.session.add_torrent(parameters)
                try:
                    # Added anew now and then: an unreachable peer is otherwise tried too seldom.
                    with trio.move_on_after(10.0 if self.swarm.settings.discovers else 2.0):
                        await wait.arrived.wait()
                        found, handle = handle, None
                        return found
                finally:
                    wait.handle = None
                    if handle is not None:
                        self.swarm.session.remove_torrent(handle)
        finally:
            self.swarm.leave(wait)


class _Metadata:
    """Waits for the metadata of a magnet link."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.arrived = trio.Event()

    def on_alert(self, alert: Any) -> None:
        if isinstance(alert, lt.metadata_received_alert):
            self.arrived.set()

    def tick(self) -> bool:
        return True


def check_metadata(info: Any) -> dict[str, tuple[int, int]]:
    """The files of an image's torrent: path -> (offset, size) in its content.

    Raises UserError, saying what the torrent is, if it cannot be an image's.
    """
    files = info.files()
    found: dict[str, tuple[int, int]] = {}
    for index in range(files.num_files()):
        if files.file_flags(index) & lt.file_storage.flag_pad_file:
            continue
        path = files.file_path(index).removeprefix(f"{info.name()}/")
        found[path] = (files.file_offset(index), files.file_size(index))
    known = {MANIFEST_FILE, *OPTIONAL_FILES} | {layer_path(index) for index in range(len(found))}
    known_index = found.keys() == {indexes.INDEX_FILE}
    if info.name() != IMAGE_NAME or not (known_index or (MANIFEST_FILE in found and found.keys() <= known)):
        what = f"{len(found)} files" if len(found) != 1 else "one file"
        hint = "give the hash `hostos image publish` printed, not that of a layer"
        raise UserError(f"that hash is of no image but of a torrent {info.name()[:60]!r} of {what}", hint)
    if sum(size for _, size in found.values()) > MAX_IMAGE_SIZE:
        raise UserError(f"that image's metadata is larger than {MAX_IMAGE_SIZE} bytes: refused")
    return found
