"""The store: whole or not there, whatever happens to who writes it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.image.store import Store, describe
from hostos.live.manifest import Layer, Manifest
from hostos.live.torrents import Torrent, make_layer_torrent


def put(store: Store, name: str = "test", seed: int = 1, size: int = 100_000) -> str:
    with store.incoming() as temporary:
        path = temporary / "layer"
        path.write_bytes(random.Random(seed).randbytes(size))
        torrent = make_layer_torrent(path)
        return store.add(manifest(name, torrent), [(torrent, path)])


def manifest(name: str, torrent: Torrent) -> Manifest:
    return Manifest(name, "x86_64", (Layer(torrent.info_hash, torrent.size, torrent.name),))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data")


def test_what_is_added_is_found(store: Store) -> None:
    image = put(store, "web/one")
    found = store.get(image)
    assert (found.hash, found.name, found.missing) == (image, "web/one", ())
    assert store.get(image[:8]) == store.get("web/one") == store.get(f"magnet:?xt=urn:btmh:1220{image}") == found
    bundle = store.bundle("web/one")
    assert bundle.image == image
    assert (found.directory / "image.torrent").read_bytes() == bundle.torrent.data
    layer = bundle.manifest.layers[0]
    assert make_layer_torrent(store.layer_path(layer)).info_hash == layer.torrent
    assert describe(found)["complete"] is True
    assert not list(store.incoming_dir.iterdir())


def test_adding_again_renews_the_date_only(store: Store) -> None:
    image = put(store)
    file = store.images_dir / image / "image.torrent"
    os.utime(file, (1, 1))
    inode = file.stat().st_ino
    assert put(store) == image
    assert file.stat().st_ino == inode
    assert store.get(image).published > time.time() - 60


def test_a_name_means_the_latest_image(store: Store) -> None:
    old, new = put(store, seed=1), put(store, seed=2)
    os.utime(store.images_dir / old / "image.torrent", (1, 1))
    assert store.get("test").hash == new
    assert [image.hash for image in store.images()] == [new, old]


def test_unknown_and_ambiguous_references(store: Store) -> None:
    image = put(store)
    for reference in ("nothing", "0" * 64, image[:7], ""):
        with pytest.raises(UserError, match="no image"):
            store.get(reference)
        assert store.find(reference) is None
    other = image[:10] + ("0" if image[10] != "0" else "1") + image[11:]
    os.rename(store.images_dir / image, store.images_dir / other)  # noqa: PTH104
    put(store)
    with pytest.raises(UserError, match="beginning of 2"):
        store.get(image[:10])


def test_layers_are_shared_and_go_with_their_last_image(store: Store) -> None:
    first, second = put(store, "one"), put(store, "two")
    assert len(list(store.layers_dir.iterdir())) == 1
    assert store.remove(first) < 50_000
    assert store.get(second).missing == ()
    assert store.remove("two") >= 100_000
    assert list(store.layers_dir.iterdir()) == []
    with pytest.raises(UserError, match="no image"):
        store.remove(second)


def test_broken_entries_are_told_apart(store: Store) -> None:
    good = put(store, "good", 1)
    bad = put(store, "bad", 2)
    (store.images_dir / bad / "manifest.json").write_text("{")
    (store.images_dir / "junk").mkdir()
    (store.images_dir / ("f" * 64)).write_text("a file")
    assert [image.hash for image in store.images()] == [good]
    assert {item.path.name for item in store.broken()} == {bad, "junk", "f" * 64}
    with pytest.raises(UserError, match="is broken"):
        store.get(bad)
    # Nobody knows which layers the broken one needs, so none is removed.
    store.remove(good)
    assert len(list(store.layers_dir.iterdir())) == 2
    store.remove(bad)
    assert list(store.layers_dir.iterdir()) == []


@pytest.mark.parametrize("file", ["manifest.json", "layers/0.torrent", "image.torrent"])
def test_damaged_files_are_noticed_and_repaired_by_publishing(store: Store, file: str) -> None:
    image = put(store)
    path = store.images_dir / image / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if file != "image.torrent":
        with pytest.raises(UserError):
            store.bundle(image)
    assert put(store) == image
    assert store.bundle(image).torrent.data == (store.images_dir / image / "image.torrent").read_bytes()


def test_a_missing_or_cut_layer_is_told(store: Store) -> None:
    image = put(store)
    layer = store.get(image).manifest.layers[0]
    os.truncate(store.layer_path(layer), 10)
    assert store.get(image).missing == (layer.torrent,)
    store.layer_path(layer).unlink()
    assert store.get(image).missing == (layer.torrent,)
    put(store)
    assert store.get(image).missing == ()


CHILD = """
import sys, random, time
from pathlib import Path
sys.path.insert(0, {here!r})
from test_image_store import put
from hostos.image.store import Store
print("ready", flush=True)
n = 0
while True:
    put(Store(Path({root!r})), f"image{{n % 3}}", n % 5, 400_000)
    n += 1
"""


def test_sigkill_at_any_moment_leaves_no_half_image(store: Store) -> None:
    text = CHILD.format(here=str(Path(__file__).parent), root=str(store.root))
    rng = random.Random(7)
    complete = 0
    for attempt in range(1, 13):
        child = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        # The busier the host, the longer until one is complete.
        time.sleep(rng.uniform(0.0, 0.05) * (1 if complete else attempt))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert store.broken() == []
        for image in store.images():
            assert image.missing == ()
            layer = store.bundle(image.hash).manifest.layers[0]
            assert make_layer_torrent(store.layer_path(layer)).info_hash == layer.torrent
            complete += 1
    assert complete
    for path in store.incoming_dir.iterdir():
        os.utime(path, (1, 1))
    put(store, "after")
    assert list(store.incoming_dir.iterdir()) == []


def test_what_is_being_made_is_left_alone(store: Store) -> None:
    with store.incoming() as mine:
        os.utime(mine, (1, 1))
        put(store)
        assert mine.is_dir()
    assert not mine.exists()


def test_listing_nothing(store: Store) -> None:
    assert store.images() == []
    assert store.broken() == []
    assert not store.root.exists()


def test_json_of_an_image(store: Store) -> None:
    image = put(store, "web/one")
    data = json.loads(json.dumps(describe(store.get(image))))
    assert data["schema"] == 1
    assert data["manifest"]["layers"][0]["size"] == data["size"] == 100_000
