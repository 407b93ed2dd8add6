"""The cache: what goes when room is short, what stays, and what is said of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.live.cache import Cache, parse_limit
from hostos.live.manifest import Layer, Manifest

LAYER = 1 << 20


class Kept:
    """A cache with layers of a MiB, numbered from 1, the first one used longest ago."""

    def __init__(self, place: Path, count: int, limit: int) -> None:
        self.place = place
        self.mounted: set[str] = set()
        self.cache = Cache(place, lambda: self.mounted, limit)
        for number in range(1, count + 1):
            path = place / "layers" / self.hash(number)
            path.mkdir()
            (path / "content").write_bytes(bytes(1) * LAYER)
            os.utime(path, (number, number))

    @staticmethod
    def hash(number: int) -> str:
        return f"{number:064x}"

    def image(self, number: int, name: str, *layers: int) -> str:
        digest = f"{number:064x}"
        path = self.place / "images" / digest
        path.mkdir()
        made = tuple(Layer(self.hash(layer), LAYER, f"hostos-{layer:016x}.squashfs") for layer in layers)
        (path / "manifest.json").write_bytes(Manifest(name, "x86_64", made).to_json())
        return digest

    def here(self) -> set[int]:
        return {int(layer.hash, 16) for layer in self.cache.layers()}


def test_the_layer_used_longest_ago_goes_first(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 6, 4 * LAYER)
    assert kept.cache.evict() >= 2 * LAYER
    assert kept.here() == {4, 5, 6}
    assert kept.cache.evict() == 0
    kept.cache.use(kept.hash(4))
    assert kept.cache.layers()[-1].hash == kept.hash(4)


@settings(deadline=None, max_examples=30)
@given(mounted=st.sets(st.integers(1, 6)), pinned=st.sets(st.integers(1, 6)), limit=st.integers(1, 6))
def test_what_is_mounted_or_pinned_never_goes(
    tmp_path_factory: pytest.TempPathFactory, mounted: set[int], pinned: set[int], limit: int
) -> None:
    kept = Kept(tmp_path_factory.mktemp("cache"), 6, limit * LAYER)
    kept.mounted = {kept.hash(number) for number in mounted}
    for number in pinned:
        kept.cache.pin(kept.image(100 + number, f"i{number}x", number), True)
    kept.cache.evict()
    assert mounted | pinned <= kept.here()
    assert len(kept.here()) <= max(limit, len(mounted | pinned))
    kept.cache.prune()
    assert kept.here() == mounted | pinned


def test_prune_takes_metadata_with_it_and_leaves_shared_layers(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 3, 9 * LAYER)
    first, second = kept.image(7 << 240, "one", 1, 2), kept.image(8 << 240, "two", 2, 3)
    kept.cache.pin(first, True)
    assert kept.cache.prune(kept.cache.find("one")) >= LAYER
    assert kept.here() == {2, 3}
    assert kept.cache.pins() == set()
    assert [image.hash for image in kept.cache.images()] == [first, second]
    kept.cache.prune()
    assert kept.here() == set()
    assert kept.cache.images() == []


def test_what_is_said_of_it(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 2, 9 * LAYER)
    digest = kept.image(7 << 240, "web", 1, 2)
    kept.mounted = {kept.hash(2)}
    (tmp_path / "images" / ("f" * 64)).mkdir()
    (tmp_path / "images/.new").mkdir()
    (tmp_path / "layers/other").mkdir()
    found = kept.cache.describe()
    assert found["limit"] == 9 * LAYER
    (image,) = found["images"]
    assert image.pop("here") == found["size"] >= 2 * LAYER
    assert image == {
        "image": digest, "name": "web", "size": 2 * LAYER, "used": 2.0, "mounted": True, "pinned": False
    }  # fmt: skip


def test_finding_an_image(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 1, LAYER)
    first = kept.image(7 << 240, "web", 1)
    assert kept.cache.find("web").hash == kept.cache.find(first).hash == kept.cache.find(first[:8]).hash == first
    kept.image(8 << 240, "web", 1)
    for text, why in (("web", "2 images"), ("other", "no image"), ("ab" * 32, "no image"), (first[:7], "no image")):
        with pytest.raises(UserError, match=why):
            kept.cache.find(text)


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("512m", 512 << 20), ("20G", 20 << 30), ("3k", 3072)])
def test_sizes(text: str, size: int) -> None:
    assert parse_limit(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5g", "1gb", "50%", "9" * 20])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="not a size"):
        parse_limit(text)
