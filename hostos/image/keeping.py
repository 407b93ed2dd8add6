"""Keeping images alive: pins, how many copies others have, and what may go."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError
from hostos.image import sandbox, unpacked
from hostos.image.buildcache import BuildCache
from hostos.image.store import Store, StoredImage, file_size
from hostos.live.torrents import ImageBundle, Torrent

ANSWER_DEADLINE = 6.0
"""Seconds in which peers have to say what they have."""
CACHE_DAYS = 30


class Pins:
    """Images that shall stay: `pins/<image hash>` in the store."""

    def __init__(self, store: Store) -> None:
        self._place = store.root / "pins"

    def all(self) -> set[str]:
        return {path.name for path in self._place.iterdir()} if self._place.is_dir() else set()

    def set(self, image: str, keep: bool) -> None:
        path = self._place / image
        if keep:
            self._place.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            path.unlink(missing_ok=True)


def copies(bundle: ImageBundle, peers: Iterable[str], deadline: float = ANSWER_DEADLINE) -> list[str]:
    """Which of `peers` (`HOST:PORT`) have all layers whole; each is asked, and nothing is fetched.

    A peer that doesn't answer in time counts as having nothing.
    """
    asked = list(peers)
    found = holders(bundle.layers, asked, deadline)
    return [peer for peer in asked if all(peer in each for each in found.values())]


def holders(
    layers: Iterable[Torrent], peers: Iterable[str], deadline: float = ANSWER_DEADLINE, *, one: bool = False
) -> dict[str, set[str]]:
    """By layer (its hash), which of `peers` have all of it; each is asked within `deadline` seconds, all at once.

    `one`: one of them is enough for each layer.
    """
    import libtorrent as lt

    peers = list(peers)
    wanted = {(host.strip("[]"), int(port)): f"{host}:{port}" for host, _, port in (p.rpartition(":") for p in peers)}
    torrents = {torrent.info_hash: torrent for torrent in layers}
    if not wanted:
        return {name: set() for name in torrents}
    session = lt.session(
        {
            "listen_interfaces": "",
            "enable_dht": False, "enable_lsd": False, "enable_upnp": False, "enable_natpmp": False,
            "enable_incoming_tcp": False, "enable_incoming_utp": False, "enable_outgoing_utp": False,
            "allow_multiple_connections_per_ip": True,
            # Or two who have nothing for each other would part before they have said so.
            "close_redundant_connections": False,
            "alert_mask": 0,
        }
    )  # fmt: skip
    handles = []
    for torrent in torrents.values():
        parameters = lt.add_torrent_params()
        decoded = lt.bdecode(torrent.data)
        parameters.ti = lt.torrent_info(decoded)  # type: ignore[arg-type]
        parameters.save_path = "/nonexistent"
        parameters.flags |= lt.torrent_flags.default_dont_download | lt.torrent_flags.no_verify_files
        parameters.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
        handles.append(session.add_torrent(parameters))
    full: list[set[str]] = [set() for _ in handles]
    until, again = time.monotonic() + deadline, 0.0
    try:
        while time.monotonic() < until:
            call, again = time.monotonic() >= again, again if time.monotonic() < again else time.monotonic() + 1.0
            for handle, found in zip(handles, full, strict=True):
                for endpoint in wanted if call else ():
                    handle.connect_peer(endpoint)
                for peer in handle.get_peer_info():
                    if peer.flags & lt.peer_info.seed and (name := wanted.get((str(peer.ip[0]), int(peer.ip[1])))):
                        found.add(name)
            if all(len(found) >= (1 if one else len(wanted)) for found in full):
                break
            time.sleep(0.1)
    finally:
        session.pause()
    return dict(zip(torrents, full, strict=True))


def last_copies(
    store: Store, images: Iterable[StoredImage], peers: Iterable[str], deadline: float = ANSWER_DEADLINE
) -> list[str]:
    """Of which of `images` this host removes the last known copy when all of them go: their names.

    Only layers count that no other image here has. Who has them is asked of `peers`, for `deadline` seconds at most.
    """
    going = list(images)
    hashes = {image.hash for image in going}
    kept = {layer.torrent for image in store.images() if image.hash not in hashes for layer in image.manifest.layers}
    at_stake: dict[str, list[Torrent]] = {}
    for image in going:
        if not image.missing:
            at_stake[image.name] = [each for each in store.bundle(image.hash).layers if each.info_hash not in kept]
    found = holders((each for layers in at_stake.values() for each in layers), peers, deadline, one=True)
    return [name for name, layers in at_stake.items() if any(not found[each.info_hash] for each in layers)]


def check_removable(store: Store, image: StoredImage, meanings: Iterable[str], *, force: bool) -> list[str]:
    """Warnings about removing an image. `meanings`: names of one's own that mean it now.

    Raises UserError without `force`: it is pinned, or a name of one's own means it.
    """
    names = sorted(meanings)
    why = []
    if image.hash in Pins(store).all():
        why.append(("it is pinned", f"hostos image unpin {image.name}"))
    if names:
        why.append((f"your name {names[0]} means it: others may look for it", f"hostos image push ANOTHER {names[0]}"))
    if why and not force:
        reasons = " and ".join(reason for reason, _ in why)
        raise UserError(f"{image.name} is not removed: {reasons}", f"{why[0][1]}; or --force")
    return [reason for reason, _ in why]


@dataclass(frozen=True)
class Garbage:
    """What nobody needs: each path, and the bytes it takes."""

    path: Path
    size: int
    what: str


def garbage(store: Store, days: int = CACHE_DAYS) -> list[Garbage]:
    """Layers no image has, and what builds left unused for `days`."""
    found: list[Garbage] = []
    if store.layers_dir.is_dir() and not store.broken():
        used = {layer.torrent for image in store.images() for layer in image.manifest.layers}
        found += [
            Garbage(path, file_size(path), "layer no image has")
            for path in sorted(store.layers_dir.iterdir())
            if path.name not in used
        ]
    before = time.time() - days * 86400
    cache = BuildCache()
    for path in sorted([*(cache.root / "steps").iterdir(), *(cache.root / "layers").iterdir()]):
        if path.stat().st_atime < before and path.stat().st_mtime < before:
            found.append(Garbage(path, file_size(path), "build cache"))
    scratch = Path(os.environ.get("TMPDIR", "/var/tmp")) / f"hostos-build-{os.geteuid()}"
    for path in sorted(scratch.glob("t/*")) + sorted(scratch.glob("w*")):
        if path.stat().st_ctime < before:
            found.append(Garbage(path, file_size(path), "layer unpacked for builds"))
    return found


def collect(found: Iterable[Garbage]) -> int:
    """Remove it; the bytes that are free."""
    free = 0
    for each in found:
        if each.what.startswith("layer unpacked"):
            unpacked.remove(each.path, sandbox.ids())
        elif each.path.is_dir():
            shutil.rmtree(each.path, ignore_errors=True)
        else:
            each.path.unlink(missing_ok=True)
        free += each.size
    return free
