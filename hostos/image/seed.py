"""The seed: one libtorrent session that offers what is in the store. `python -m hostos.image.seed`

Run in the background by `hostos.image.seeding`. Its control socket (`hostos.background`) takes
`{"op": "status"}`, `{"op": "reload"}`, `{"op": "stop"}` and `{"op": "admit", "host": …, "guest": …}`.
Announces itself to nobody unless it was started with `--lan` or `--public`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import libtorrent

from hostos import __version__, background
from hostos.errors import UserError
from hostos.image.indexes import StoredIndex, all_indexes
from hostos.image.indexes import directory as indexes_directory
from hostos.image.seed_session import Door, listen
from hostos.image.seeding import Place
from hostos.image.store import IMAGE_TORRENT, Store, StoredImage
from hostos.live.interfaces import Interfaces, listen_again
from hostos.live.nodelay import NoDelay
from hostos.live.swarm_settings import SwarmSettings
from hostos.live.torrents import Torrent, parse_layer_torrent

RESCAN = 1.0
"""Seconds between looks at the store (a publish also says `reload`)."""


@dataclass
class Seeder:
    """Keeps the torrents of a session equal to the content of a store."""

    session: Any
    store: Store
    log: Callable[[str], None]
    handles: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    only: frozenset[str] = frozenset()
    """Hashes of the images to offer; empty: all."""
    _stamp: object = None

    def changed(self) -> bool:
        """Has the store changed since the last call?"""
        stamp = tuple(
            _mtime(path) for path in (self.store.images_dir, self.store.layers_dir, indexes_directory(self.store))
        )
        changed, self._stamp = stamp != self._stamp, stamp
        return changed

    def reload(self) -> None:
        wanted: dict[str, Callable[[], Any]] = {}
        for image in self.store.images():
            if self.only and image.hash not in self.only:
                continue
            if image.missing:
                self.log(f"image {image.hash} ({image.name}): layers missing, not seeded")
                continue
            wanted[image.hash] = partial(self._image, image)
            for number, layer in enumerate(image.manifest.layers):
                wanted[layer.torrent] = partial(self._layer, image, number)
        for index in all_indexes(self.store):
            wanted[index.hash] = partial(self._index, index)
        for key in self.handles.keys() - wanted.keys():
            self.session.remove_torrent(self.handles.pop(key))
            self.log(f"no longer seeding {self.kinds.pop(key)} {key}")
        for key in wanted.keys() - self.handles.keys():
            try:
                parameters, kind = wanted[key]()
                self.handles[key] = self.session.add_torrent(parameters)
                self.kinds[key] = kind
                self.log(f"seeding {kind} {key}")
            except (UserError, OSError, RuntimeError) as error:
                self.log(f"can't seed {key}: {error}")

    def _image(self, image: StoredImage) -> tuple[Any, str]:
        return self._metadata(image.directory, self.store.bundle(image.hash).torrent), "image"

    def _index(self, index: StoredIndex) -> tuple[Any, str]:
        return self._metadata(index.directory, index.index.torrent()), "index"

    def _metadata(self, directory: Path, torrent: Torrent) -> Any:
        if (directory / IMAGE_TORRENT).read_bytes() != torrent.data:
            raise UserError(f"{directory / IMAGE_TORRENT} is damaged", "publish the image again")
        parameters = _parameters(torrent.data, directory)
        # layout(): libtorrent 2.1's name for files(), whose use it warns about
        info = parameters.ti
        files = info.layout() if hasattr(info, "layout") else info.files()
        # In the store the files lie in the image's directory without the torrent's own name.
        parameters.renamed_files = {
            index: files.file_path(index).partition("/")[2]
            for index in range(files.num_files())
            if not files.file_flags(index) & libtorrent.file_storage.flag_pad_file
        }
        return parameters

    def _layer(self, image: StoredImage, number: int) -> tuple[Any, str]:
        layer = image.manifest.layers[number]
        torrent = parse_layer_torrent((image.directory / "layers" / f"{number}.torrent").read_bytes())
        if torrent.info_hash != layer.torrent:
            raise UserError(f"layer {number} of image {image.hash} is damaged", "publish the image again")
        return _parameters(torrent.data, self.store.layer_path(layer).parent), "layer"

    def status(self) -> list[dict[str, Any]]:
        result = []
        for key, handle in sorted(self.handles.items()):
            state = handle.status()
            result.append(
                {
                    "hash": key,
                    "kind": self.kinds[key],
                    "name": state.name,
                    "peers": state.num_peers,
                    "uploaded": state.total_payload_upload,
                    "upload_rate": state.upload_payload_rate,
                    "error": state.errc.message() if state.errc.value() else "",
                }
            )
        return result


def _parameters(torrent: bytes, directory: Path) -> Any:
    result = libtorrent.add_torrent_params()
    decoded: Any = libtorrent.bdecode(torrent)
    result.ti = libtorrent.torrent_info(decoded)
    result.save_path = str(directory)
    # seed_mode: taken as complete without reading it all; each piece is still hashed before it is
    # sent for the first time, so a damaged file is noticed rather than spread.
    result.flags = libtorrent.torrent_flags.seed_mode | libtorrent.torrent_flags.upload_mode
    result.flags &= ~(libtorrent.torrent_flags.auto_managed | libtorrent.torrent_flags.paused)
    return result


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


class Daemon:
    """`ready` is called once everything is seeded and the control socket is open."""

    def __init__(
        self, seeder: Seeder, place: Place, host: str, port: int, swarm: SwarmSettings, ready: Callable[[], None]
    ) -> None:
        self.seeder = seeder
        self.place = place
        self.host, self.port, self.swarm = host, port, swarm
        self.ready = ready
        self.began = time.time()
        self.stopping = asyncio.Event()
        self.nodelay = NoDelay()
        self.interfaces = Interfaces()
        self.door = Door(seeder.session, host, port)

    async def run(self) -> None:
        self.nodelay.scan()  # the listening socket: what it accepts inherits the option (Linux)
        if sys.platform != "linux":
            self.nodelay.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        self.seeder.changed()
        self.seeder.reload()
        server = await background.Control(self.place, self.answer).open()
        self.ready()
        async with server:
            while not self.stopping.is_set():
                if self.seeder.changed():
                    self.seeder.reload()
                if self.interfaces.changed():
                    listen_again(self.seeder.session)
                for alert in self.seeder.session.pop_alerts():
                    if isinstance(alert, libtorrent.listen_succeeded_alert):
                        self.nodelay.scan()
                    if alert.category() & libtorrent.alert.category_t.error_notification:
                        self.seeder.log(alert.message())
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), RESCAN)
        self.place.socket.unlink(missing_ok=True)
        self.seeder.log("stopped")

    def answer(self, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        if operation == "reload":
            self.seeder.changed()
            self.seeder.reload()
        elif operation == "stop":
            self.stopping.set()
        elif operation == "admit":
            self.door.admit(str(request.get("host")), str(request.get("guest")))
            self.nodelay.scan()
        elif operation != "status":
            raise ValueError(f"unknown operation {operation!r}")
        return self.status()

    def status(self) -> dict[str, Any]:
        torrents = self.seeder.status()
        return {
            "pid": os.getpid(),
            "host": self.host,
            "port": self.port,
            "store": str(self.seeder.store.root),
            "since": self.began,
            "upload_limit": self.swarm.upload_limit,
            "only": sorted(self.seeder.only),
            "swarm": self.swarm.to_dict(),
            "also": [f"{host}:{self.port}" for host in self.door.hosts],
            "admitted": sorted(self.door.guests),
            "uploaded": sum(torrent["uploaded"] for torrent in torrents),
            "peers": sum(torrent["peers"] for torrent in torrents),
            "torrents": torrents,
        }


def _listen(place: Place, host: str, port: int | None, swarm: SwarmSettings) -> tuple[Any, int]:
    """On `port`, or else where it listened last time, or else on any free port."""
    if port is not None:
        return listen(host, port, swarm)
    with contextlib.suppress(UserError, OSError, ValueError):
        last = int(place.port.read_text())
        if 0 < last < 65536:
            return listen(host, last, swarm)
    return listen(host, 0, swarm)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hostos.image.seed")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, help="default: the last one, or any")
    parser.add_argument("--swarm", default="{}", help="SwarmSettings, JSON")
    parser.add_argument("--only", action="append", default=[], help="an image's hash (repeatable); default: all")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    options = parser.parse_args(arguments)
    swarm = SwarmSettings.parse(json.loads(options.swarm))
    ready = background.detach()
    place = Place(options.state, options.socket)
    with background.hold(place) as alone:
        if not alone:
            background.log("another seed runs already")
            return 3
        try:
            session, port = _listen(place, options.host, options.port, swarm)
        except UserError as error:
            background.log(f"error: {error.message}")
            return 2
        place.port.write_text(f"{port}\n")
        background.write_info(place)
        background.log(f"hostos {__version__}: seeding {options.store} on {options.host}:{port}")
        seeder = Seeder(session, Store(options.store), background.log, only=frozenset(options.only))

        async def serve() -> None:
            await Daemon(seeder, place, options.host, port, swarm, ready).run()

        asyncio.run(serve())
        place.info.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
