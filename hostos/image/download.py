"""An image's layers as whole files on this host, from peers: verified block by block, nothing mounted."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import trio

from hostos.errors import UserError, failure
from hostos.live.blocks import Blocks
from hostos.live.image import Images, resolve
from hostos.live.ipfs_image import IpfsImage
from hostos.live.session import Swarm
from hostos.live.source import SourceError
from hostos.live.torrent_source import TorrentSource, from_torrent
from hostos.live.torrents import ImageBundle, Torrent
from hostos.steps import Steps

# Any port: this host only asks.
LISTEN = "0.0.0.0:0,[::]:0"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Downloaded:
    """`layers`: the files, as `bundle.layers`."""

    bundle: ImageBundle
    layers: tuple[Path, ...]


def download(
    image: str, peers: Iterable[str], directory: Path, steps: Steps, *, machine: str, deadline: float = 60.0
) -> Downloaded:
    """Fetch the image `image` (of an index: the one for `machine`) into `directory`.

    `peers`: `HOST:PORT`; nobody else is contacted. `deadline`: seconds for its metadata, and for each
    later read. Raises UserError.
    """
    try:
        got: Downloaded = trio.run(_download, image, tuple(peers), directory, steps, machine, deadline)
        return got
    except BaseExceptionGroup as group:
        # Which tasks ran beside is for nobody.
        errors, others = group.split(UserError)
        if errors is None or others is not None:
            raise
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


async def _download(
    image: str, peers: tuple[str, ...], directory: Path, steps: Steps, machine: str, deadline: float
) -> Downloaded:
    swarm = Swarm(LISTEN)
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".metadata-") as scratch:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(swarm.run)
                place = Path(scratch, "images")
                place.mkdir()
                images = Images(swarm, nursery, place, Blocks(nursery, Path(scratch)), machine)
                with steps.step("metadata"):
                    bundle = await images.load(image, peers, deadline=deadline)
                if isinstance(bundle, IpfsImage):
                    raise UserError("this is fetched from peers, by its hash, not by a CID")
                endpoints = await resolve(peers)
                layers = []
                for number, torrent in enumerate(bundle.layers):
                    layers.append(directory / f"{number}-{torrent.name}")
                    parameters, place = from_torrent(torrent.data), Path(scratch, torrent.info_hash)
                    source = TorrentSource(swarm, parameters, place, endpoints, deadline=deadline)
                    await _copy(source, torrent, layers[-1], nursery, steps)
                nursery.cancel_scope.cancel()
        return Downloaded(bundle, tuple(layers))
    finally:
        swarm.close()


async def _copy(source: TorrentSource, torrent: Torrent, target: Path, nursery: trio.Nursery, steps: Steps) -> None:
    try:
        source.start(nursery)
        with steps.step("download") as step, target.open("wb") as file:
            for start in range(0, torrent.size, _CHUNK):
                file.write(await source.read(start, min(_CHUNK, torrent.size - start)))
                step.progress(f"{start >> 20} of {torrent.size >> 20} MiB")
            step.detail = f"{torrent.size / 1e6:.1f} MB"
    except SourceError as error:
        raise failure(f"fetching {torrent.name}: {error.strerror}", "name another --peer HOST:PORT") from None
    finally:
        with trio.CancelScope(shield=True):
            await source.close()
