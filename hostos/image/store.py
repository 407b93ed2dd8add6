"""The images of this host (docs/images.md has the layout).

    images/<image hash>/     image.torrent and the image's files: manifest.json, layers/0.torrent …
    layers/<layer hash>/     the one squashfs file of a layer, shared by all images that use it
    incoming/<random>/       what is being made; appears above by rename(2), complete

A process that dies at any moment leaves at most something in `incoming` (removed by the next one
that adds) or a layer without an image (removed with the next image).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError
from hostos.live.manifest import Layer, Manifest
from hostos.live.torrents import (
    MAX_LAYER_TORRENT,
    OPTIONAL_FILES,
    ImageBundle,
    Torrent,
    layer_path,
    make_image_torrent,
    parse_image_reference,
    verify_files,
)
from hostos.locking import exclusive
from hostos.paths import data_dir, private_dir

IMAGE_TORRENT = "image.torrent"
LOCK_DEADLINE = 30.0
"""Seconds to wait for another process that changes the store."""

_HASH = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class StoredImage:
    """An image of the store. `published`: Unix time of the last publication on this host."""

    hash: str
    manifest: Manifest
    directory: Path
    published: float
    missing: tuple[str, ...] = ()
    """Hashes of layers that aren't in the store: the image can't be seeded."""

    @property
    def name(self) -> str:
        return self.manifest.name


@dataclass(frozen=True)
class Broken:
    """Something in the store that isn't a usable image, and why."""

    path: Path
    reason: str


class Store:
    def __init__(self, root: Path | None = None) -> None:
        self.root = root or data_dir()
        self.images_dir = self.root / "images"
        self.layers_dir = self.root / "layers"
        self.incoming_dir = self.root / "incoming"

    # --- adding ---

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """A private directory on the store's file system to make a layer in; removed afterwards.

        A lock on it tells it from one whose maker died; those are removed here.
        """
        private_dir(self.root)
        self.incoming_dir.mkdir(exist_ok=True)
        self._sweep()
        path = Path(tempfile.mkdtemp(dir=self.incoming_dir))
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    def _sweep(self) -> None:
        for path in self.incoming_dir.iterdir():
            # Fresh ones may be about to be locked.
            try:
                if time.time() - path.stat().st_mtime < 10:
                    continue
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except OSError:
                pass
            finally:
                os.close(descriptor)

    def add(
        self,
        manifest: Manifest,
        layers: list[tuple[Torrent, Path]],
        trace: bytes | None = None,
        bill: bytes | None = None,
    ) -> str:
        """Add an image; returns its hash. `layers`: each with its file (from `incoming()`: it is
        moved), or with its present place in the store. Adding an image again renews its date.

        Raises UserError if torrents and manifest don't belong together, a failure if another
        process keeps the store locked for `LOCK_DEADLINE` seconds.
        """
        torrent, files = make_image_torrent(manifest, [layer.data for layer, _ in layers], trace, bill)
        with self.incoming() as temporary, self.changing():
            for layer, path in layers:
                place = self.layers_dir / layer.info_hash / layer.name
                if path != place:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    path.chmod(0o644)
                    _sync(path)
                    path.replace(place)
                    _sync(place.parent)
            final = self.images_dir / torrent.info_hash
            if self._intact(torrent.info_hash):
                os.utime(final / IMAGE_TORRENT)
                return torrent.info_hash
            for name, data in {**files, IMAGE_TORRENT: torrent.data}.items():
                file = temporary / "image" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
                _sync(file)
            self.images_dir.mkdir(exist_ok=True)
            if final.exists():
                final.rename(temporary / "broken")
            (temporary / "image").rename(final)
            _sync(self.images_dir)
        return torrent.info_hash

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Held while something is added or removed; raises a failure if another process keeps it."""
        private_dir(self.root)
        with exclusive(self.root / "store.lock", LOCK_DEADLINE, f"another process keeps {self.root} locked"):
            yield

    # --- looking ---

    def images(self) -> list[StoredImage]:
        """All usable images, latest first; `broken()` has the rest."""
        return [item for item in self._scan() if isinstance(item, StoredImage)]

    def broken(self) -> list[Broken]:
        return [item for item in self._scan() if isinstance(item, Broken)]

    def _scan(self) -> list[StoredImage | Broken]:
        found: list[StoredImage | Broken] = []
        try:
            names = sorted(path.name for path in self.images_dir.iterdir())
        except FileNotFoundError:
            return []
        for name in names:
            try:
                found.append(self._load(name))
            except (UserError, OSError) as error:
                reason = error.message if isinstance(error, UserError) else error.strerror or str(error)
                found.append(Broken(self.images_dir / name, reason))
        return sorted(found, key=lambda item: -item.published if isinstance(item, StoredImage) else 0)

    def _load(self, name: str) -> StoredImage:
        directory = self.images_dir / name
        if not _HASH.fullmatch(name):
            raise UserError("its name is not an image hash")
        manifest = Manifest.parse((directory / "manifest.json").read_bytes())
        published = (directory / IMAGE_TORRENT).stat().st_mtime
        missing = tuple(layer.torrent for layer in manifest.layers if not self._has(layer))
        return StoredImage(name, manifest, directory, published, missing)

    def _has(self, layer: Layer) -> bool:
        try:
            return self.layer_path(layer).stat().st_size == layer.size
        except OSError:
            return False

    def layer_path(self, layer: Layer) -> Path:
        """Where the layer's squashfs file is (if it is)."""
        return self.layers_dir / layer.torrent / layer.file

    def get(self, reference: str) -> StoredImage:
        """The image with this hash, magnet link, unique beginning of its hash (8 digits or more)
        or name (the one published last). Raises UserError."""
        images = self.images()
        text = reference.strip()
        if _PREFIX.fullmatch(text.lower()):
            found = [image for image in images if image.hash.startswith(text.lower())]
        elif text.lower().startswith("magnet:"):
            wanted = parse_image_reference(text).info_hash
            found = [image for image in images if image.hash == wanted]
        else:
            found = [image for image in images if image.name == text][:1]
        if len(found) > 1:
            raise UserError(f"{text} is the beginning of {len(found)} images", "give more digits")
        if not found:
            self._explain(text)
            raise UserError(f"no image {text[:80]!r} in {self.images_dir}", "hostos image ls")
        return found[0]

    def _explain(self, text: str) -> None:
        for item in self.broken():
            if item.path.name.startswith(text.lower()) and len(text) >= 8:
                raise UserError(
                    f"image {item.path.name} is broken: {item.reason}",
                    f"hostos image rm {item.path.name}, then publish it again",
                )

    def _intact(self, image: str) -> bool:
        try:
            return (self.images_dir / image / IMAGE_TORRENT).read_bytes() == self.bundle(image).torrent.data
        except (UserError, OSError):
            return False

    def find(self, reference: str) -> StoredImage | None:
        """Like `get`, but None if there is no such image."""
        try:
            return self.get(reference)
        except UserError:
            return None

    def bundle(self, reference: str) -> ImageBundle:
        """The image's metadata, verified against its hash. Raises UserError."""
        image = self.get(reference)
        try:
            paths = ["manifest.json", *(layer_path(n) for n in range(len(image.manifest.layers)))]
            paths += [name for name in OPTIONAL_FILES if (image.directory / name).exists()]
            files = {path: _read(image.directory / path) for path in paths}
        except OSError as error:
            raise UserError(
                f"image {image.hash} is broken: {error.filename}: {error.strerror}", "publish it again"
            ) from None
        return verify_files(image.hash, files)

    # --- removing ---

    def remove(self, reference: str) -> int:
        """Remove an image (also a broken one, by its full hash) and the layers nobody else uses.

        Returns the bytes that became free. Raises UserError.
        """
        name = reference if (self.images_dir / reference).is_dir() and _HASH.fullmatch(reference) else None
        name = name or self.get(reference).hash
        with self.incoming() as temporary, self.changing():
            try:
                (self.images_dir / name).rename(temporary / name)
            except FileNotFoundError:
                raise UserError(f"no image {name} in {self.images_dir}", "hostos image ls") from None
            free = file_size(temporary / name)
            (self.root / "pins" / name).unlink(missing_ok=True)
            if self.layers_dir.is_dir() and not self._unreadable():
                used = {layer.torrent for image in self.images() for layer in image.manifest.layers}
                for layer in self.layers_dir.iterdir():
                    if layer.name not in used:
                        free += file_size(layer)
                        layer.rename(temporary / f"layer-{layer.name}")
        return free

    def _unreadable(self) -> bool:
        """Is there an image whose layers can't be known? Then no layer may go."""
        return any((item.path / "manifest.json").exists() for item in self.broken())


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_LAYER_TORRENT:
        raise UserError(f"{path} is too large for what it should be")
    return path.read_bytes()


def file_size(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _sync(path: Path) -> None:
    """Have `path` on the disk before its name is: after a power cut the store is whole, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(image: StoredImage) -> dict[str, object]:
    """For `--json`: schema 1."""
    return {
        "schema": 1,
        "image": image.hash,
        "name": image.name,
        "architecture": image.manifest.architecture,
        "size": image.manifest.size,
        "published": image.published,
        "complete": not image.missing,
        "manifest": json.loads(image.manifest.to_json()),
    }
