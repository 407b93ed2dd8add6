"""An index: one hash for the images of several architectures (docs/images.md).

It is a torrent as an image's (docs/images.md), of one file that names an image for each architecture.
Whoever boots it takes the one for its own machine; the images know nothing of it. Like `Manifest`, it
comes from strangers: nothing is taken for granted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hostos.errors import UserError
from hostos.live.manifest import MAX_MANIFEST, check_name
from hostos.live.torrents import Torrent, image_torrent

SCHEMA = 1
KIND = "hostos-index"
INDEX_FILE = "index/images.json"
"""The one file. In a directory: a torrent of a single file at its root bears that file's name."""
MOST = 32
"""How many images an index names at most."""

_HASH = re.compile(r"[0-9a-f]{64}")
_ARCHITECTURE = re.compile(r"[a-z0-9_]{1,32}")


@dataclass(frozen=True)
class Index:
    """`images`: architecture (as uname(1) says it) -> hash of its image. Construction checks
    everything and raises UserError."""

    name: str
    images: Mapping[str, str]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise _bad("its name is not a string")
        check_name(self.name)
        if not isinstance(self.images, Mapping) or not 1 <= len(self.images) <= MOST:
            raise _bad(f"it does not name 1 to {MOST} images")
        for architecture, image in self.images.items():
            if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
                raise _bad(f"{str(architecture)[:40]!r} is not an architecture")
            if not isinstance(image, str) or not _HASH.fullmatch(image):
                raise _bad(f"the hash of its image for {architecture} is not 64 lower-case hex digits")

    def choose(self, architecture: str) -> str:
        """The hash of the image for `architecture`, else of one for `any`. Raises UserError."""
        found = self.images.get(architecture) or self.images.get("any")
        if found is None:
            raise UserError(
                f"image {self.name} is there for {', '.join(sorted(self.images))}, this machine is {architecture}",
                f"boot it in another: hostos up -m NAME --arch {min(self.images)}",
            )
        return found

    def to_json(self) -> bytes:
        """The one spelling of this index: keys sorted, no spaces, UTF-8, one final newline."""
        data = {"schema": SCHEMA, "kind": KIND, "name": self.name, "images": dict(self.images)}
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"

    def torrent(self) -> Torrent:
        return image_torrent({INDEX_FILE: self.to_json()})


def parse(data: bytes) -> Index:
    """The index in `data` (JSON). Raises UserError on anything malformed."""
    value = _json(data)
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise _bad("it is something else")
    if value.get("schema") != SCHEMA or type(value["schema"]) is not int:
        raise UserError(f"the index has schema {str(value.get('schema'))[:20]}, this hostos knows {SCHEMA}")
    if unknown := value.keys() - {"schema", "kind", "name", "images"}:
        raise _bad(f"it has the unknown key {min(unknown)[:40]!r}")
    index = Index(value.get("name", ""), value.get("images", {}))
    if index.to_json() != data:
        raise _bad("it is not in its canonical form")
    return index


def verify(image: str, files: Mapping[str, bytes]) -> Index | None:
    """The index with the hash `image` whose files these are; None if they are those of an image.
    Raises UserError if they are neither."""
    if files.keys() != {INDEX_FILE}:
        return None
    index = parse(files[INDEX_FILE])
    if index.torrent().info_hash != image:
        raise _bad(f"its content has the hash {index.torrent().info_hash} instead of {image}")
    return index


def _json(data: bytes) -> Any:
    if len(data) > MAX_MANIFEST:
        return None
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):
        return None


def _bad(why: str) -> UserError:
    return UserError(f"image index: {why}", "the index is damaged or was made by another program")
