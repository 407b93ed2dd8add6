"""The indexes of this host: one hash for images of several architectures.

    indexes/<hash>/     image.torrent and index/images.json (hostos/live/index.py has the format)

Beside the images rather than among them: an index has no layers, and removing it removes no image.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError
from hostos.image.store import IMAGE_TORRENT, Store, StoredImage
from hostos.live import index as format_of
from hostos.live.index import INDEX_FILE, Index
from hostos.live.torrents import parse_image_reference


@dataclass(frozen=True, eq=False)
class StoredIndex:
    """`published`: Unix time of the last publication on this host."""

    hash: str
    index: Index
    directory: Path
    published: float

    @property
    def name(self) -> str:
        return self.index.name


def directory(store: Store) -> Path:
    return store.root / "indexes"


def publish(store: Store, name: str, references: tuple[str, ...]) -> StoredIndex:
    """Make an index called `name` of these images of the store. The same ones give the same hash.

    Raises UserError: an image is unknown, or two are for one architecture.
    """
    by_architecture: dict[str, StoredImage] = {}
    for reference in references:
        image = store.get(reference)
        other = by_architecture.setdefault(image.manifest.architecture, image)
        if other.hash != image.hash:
            raise UserError(
                f"{other.name} and {image.name} are both for {image.manifest.architecture}",
                "an index names one image for each architecture",
            )
    index = Index(name, {architecture: image.hash for architecture, image in by_architecture.items()})
    torrent = index.torrent()
    place = directory(store) / torrent.info_hash
    with store.incoming() as temporary:
        made = temporary / "index"
        (made / INDEX_FILE).parent.mkdir(parents=True)
        (made / INDEX_FILE).write_bytes(index.to_json())
        (made / IMAGE_TORRENT).write_bytes(torrent.data)
        place.parent.mkdir(exist_ok=True)
        if place.exists():
            # Another process may have put the same there: whichever stays, it is the same.
            place.rename(temporary / "old")
        made.rename(place)
    return _load(place)


def all_indexes(store: Store) -> list[StoredIndex]:
    """All sound ones, latest first."""
    found = []
    try:
        places = list(directory(store).iterdir())
    except FileNotFoundError:
        return []
    for place in places:
        try:
            found.append(_load(place))
        except (UserError, OSError):
            continue
    return sorted(found, key=lambda each: -each.published)


def find(store: Store, reference: str) -> StoredIndex | None:
    """The index with this hash, magnet link, unique beginning of its hash (8 digits or more) or name
    (the one published last; not if an image of that name was published later)."""
    text = reference.strip()
    if text.lower().startswith("magnet:"):
        text = parse_image_reference(text).info_hash
    known = all_indexes(store)
    by_hash = [each for each in known if len(text) >= 8 and each.hash.startswith(text.lower())]
    if by_hash:
        return by_hash[0] if len(by_hash) == 1 and store.find(text) is None else None
    named = next((each for each in known if each.name == text), None)
    if named is None:
        return None
    image = store.find(text)
    return named if image is None or image.published <= named.published else None


def remove(store: Store, found: StoredIndex) -> None:
    """Remove an index; its images stay."""
    with store.incoming() as temporary:
        try:
            found.directory.rename(temporary / "index")
        except FileNotFoundError:
            raise UserError(f"no index {found.hash} in {directory(store)}", "hostos image ls") from None
        shutil.rmtree(temporary / "index", ignore_errors=True)


def describe(found: StoredIndex) -> dict[str, object]:
    """For `--json`: schema 1."""
    return {
        "schema": 1,
        "index": found.hash,
        "name": found.name,
        "published": found.published,
        "images": dict(found.index.images),
    }


def _load(place: Path) -> StoredIndex:
    index = format_of.verify(place.name, {INDEX_FILE: (place / INDEX_FILE).read_bytes()})
    if index is None:
        raise UserError(f"{place} holds no index")
    return StoredIndex(place.name, index, place, (place / IMAGE_TORRENT).stat().st_mtime)
