"""What has been fetched, kept for the next container: looked at, pinned, and given up when room is short.

    layers/HASH/   one layer: its file (sparse) and a note of the pieces that are in it
    images/HASH/   the metadata of an image
    pins/HASH      an image whose layers shall stay

All of it can be fetched again. What is mounted is never touched.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostos.errors import UserError
from hostos.live.manifest import Manifest
from hostos.live.torrents import MANIFEST_FILE

SHARE = 0.9
"""Of its file system the cache takes at most this much, unless a limit is given."""
ROOM = 0.95
"""Once it is too large it is brought down to this share of its limit."""

_HASH = re.compile(r"[0-9a-f]{64}")
_LIMIT = re.compile(r"([1-9][0-9]{0,15})([kmgt]?)", re.IGNORECASE)


def parse_limit(text: str) -> int:
    """Bytes: a number, or one with k, m, g or t (powers of 1024). Raises UserError."""
    match = _LIMIT.fullmatch(text)
    if not match:
        raise UserError(f"not a size for the cache: {text[:40]!r}", "write e.g. 512m or 20g")
    factor: int = 1024 ** " kmgt".index(match[2].lower() or " ")
    return int(match[1]) * factor


@dataclass(frozen=True)
class Layer:
    """`size`: bytes it takes; `used`: Unix time of the last mount; `mounted`: a container has it."""

    hash: str
    size: int
    used: float
    mounted: bool


@dataclass(frozen=True)
class Image:
    """`layers`: hashes; `size`: bytes of the whole image."""

    hash: str
    name: str
    size: int
    layers: tuple[str, ...]
    pinned: bool


class Cache:
    """`mounted()`: hashes of the layers in use. `limit`: bytes (None: `SHARE` of the file system).

    Nothing here is quick enough for the loop that serves reads: call from a thread.
    """

    def __init__(self, place: Path, mounted: Callable[[], set[str]], limit: int | None = None) -> None:
        self._place, self._mounted, self._limit = place, mounted, limit
        for name in ("layers", "images", "pins"):
            (place / name).mkdir(parents=True, exist_ok=True)

    # --- looking ------------------------------------------------------------------------------------

    def layers(self) -> list[Layer]:
        """The layer used longest ago first."""
        mounted = self._mounted()
        found = []
        for path in self._hashes("layers"):
            with suppress(OSError):
                sizes = [file.stat().st_blocks * 512 for file in path.iterdir()]
                found.append(Layer(path.name, sum(sizes), path.stat().st_mtime, path.name in mounted))
        return sorted(found, key=lambda layer: layer.used)

    def images(self) -> list[Image]:
        """Those whose metadata is here and sound."""
        pins = self.pins()
        found = []
        for path in self._hashes("images"):
            with suppress(OSError, UserError):
                manifest = Manifest.parse((path / MANIFEST_FILE).read_bytes())
                hashes = tuple(layer.torrent for layer in manifest.layers)
                found.append(Image(path.name, manifest.name, manifest.size, hashes, path.name in pins))
        return sorted(found, key=lambda image: (image.name, image.hash))

    def pins(self) -> set[str]:
        return {path.name for path in self._hashes("pins")}

    def limit(self) -> int:
        """Bytes that all layers together may take."""
        system = os.statvfs(self._place)
        most = int(SHARE * system.f_blocks * system.f_frsize)
        return min(self._limit, most) if self._limit is not None else most

    def describe(self) -> dict[str, Any]:
        layers = {layer.hash: layer for layer in self.layers()}
        images = []
        for image in self.images():
            here = [layers[digest] for digest in image.layers if digest in layers]
            images.append(
                {
                    "image": image.hash,
                    "name": image.name,
                    "size": image.size,
                    "here": sum(layer.size for layer in here),
                    "used": max((layer.used for layer in here), default=0.0),
                    "mounted": any(layer.mounted for layer in here),
                    "pinned": image.pinned,
                }
            )
        return {"limit": self.limit(), "size": sum(layer.size for layer in layers.values()), "images": images}

    def find(self, text: str) -> Image:
        """The image with this name, hash, or beginning of a hash (8 digits or more). Raises UserError."""
        images = self.images()
        same = re.fullmatch(r"[0-9a-f]{8,64}", text)
        found = [image for image in images if (image.hash.startswith(text) if same else image.name == text)]
        if len(found) == 1:
            return found[0]
        why = f"{len(found)} images in the cache are called {text}" if found else f"no image {text[:80]!r} in the cache"
        raise UserError(why, "give its hash: hostos cache ls")

    # --- changing -----------------------------------------------------------------------------------

    def use(self, layer: str) -> None:
        """It is mounted now."""
        with suppress(OSError):
            os.utime(self._place / "layers" / layer)

    def pin(self, image: str, keep: bool) -> None:
        """Whether the layers of the image with this hash stay."""
        path = self._place / "pins" / image
        if keep:
            path.touch()
        else:
            path.unlink(missing_ok=True)

    def evict(self) -> int:
        """If it is too large, remove layers, the one used longest ago first; the bytes that became free."""
        layers, limit = self.layers(), self.limit()
        total, free = sum(layer.size for layer in layers), 0
        if total <= limit:
            return 0
        kept = self._pinned()
        for layer in layers:
            if total - free <= ROOM * limit:
                break
            if layer.hash not in kept:
                free += self._remove(layer)
        return free

    def prune(self, image: Image | None = None) -> int:
        """Remove everything nobody uses or has pinned (of `image`: also if it is pinned); bytes freed."""
        if image is not None:
            others = [other for other in self.images() if other.hash != image.hash]
            kept = {digest for other in others for digest in other.layers}
            self.pin(image.hash, False)
            doomed = [layer for layer in self.layers() if layer.hash in image.layers and layer.hash not in kept]
        else:
            kept = self._pinned()
            doomed = [layer for layer in self.layers() if layer.hash not in kept]
        free = sum(self._remove(layer) for layer in doomed)
        left = {layer.hash for layer in self.layers()}
        for other in self.images():
            if not left & set(other.layers) and not other.pinned:
                shutil.rmtree(self._place / "images" / other.hash, ignore_errors=True)
        return free

    def _pinned(self) -> set[str]:
        return {digest for image in self.images() if image.pinned for digest in image.layers}

    def _remove(self, layer: Layer) -> int:
        # Asked again: it may have been mounted since.
        if layer.mounted or layer.hash in self._mounted():
            return 0
        shutil.rmtree(self._place / "layers" / layer.hash, ignore_errors=True)
        return layer.size

    def _hashes(self, kind: str) -> Iterator[Path]:
        return (path for path in sorted((self._place / kind).iterdir()) if _HASH.fullmatch(path.name))
