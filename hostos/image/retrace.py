"""From an image to one that boots faster: watch it boot, pack its top layer in that order.

What is watched is a *twin* of the image: the same tree, not compressed and without fragment blocks,
so that every block read belongs to exactly one file. In the image itself a block of many small files
would not tell which of them was wanted.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO

from hostos.errors import failure
from hostos.image.layers import as_tar, need, torrents
from hostos.image.layout import Layout, read_layout
from hostos.image.pack import BLOCK_SIZE, pack
from hostos.image.recording import Recording, to_trace
from hostos.image.store import Store, StoredImage
from hostos.live.manifest import Layer, Manifest
from hostos.live.torrents import Torrent, make_layer_torrent
from hostos.steps import Steps

TWIN_NAME = "hostos/tracing"


@contextmanager
def twin(store: Store, image: StoredImage, steps: Steps) -> Iterator[tuple[str, Layout]]:
    """The image's twin, in the store as long as the context: its hash, and its top layer's layout."""
    layers = torrents(store, image)
    with store.incoming() as temporary:
        file = temporary / "layer.squashfs"
        with steps.step("copy without compression") as step:
            with as_tar(layers[-1][1]) as source:
                _run(
                    ["sqfstar", "-quiet", "-no-progress", "-noI", "-noD", "-noF", "-noX", "-no-fragments",
                     "-no-duplicates", "-b", str(BLOCK_SIZE), str(file)],
                    source,
                )  # fmt: skip
            layout = read_layout(file)
            torrent = make_layer_torrent(file)
            step.detail = f"{torrent.size >> 20} MiB"
        manifest = _manifest(image.manifest, torrent, TWIN_NAME)
        added = store.add(manifest, [*layers[:-1], (torrent, file)])
    try:
        yield added, layout
    finally:
        store.remove(added)


def repack(store: Store, image: StoredImage, recording: Recording, steps: Steps) -> str:
    """The image packed in the order of `recording`, and with its trace; returns the new hash.

    The same image and recording give the same hash. Raises UserError.
    """
    layers = torrents(store, image)
    with store.incoming() as temporary:
        tree = temporary / "tree.tar"
        with steps.step("unpack") as step:
            with as_tar(layers[-1][1]) as source, tree.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            step.detail = f"{tree.stat().st_size >> 20} MiB"
        file = temporary / "layer.squashfs"
        packed = pack(tree, file, steps, architecture=image.manifest.architecture, order=recording.order())
        tree.unlink()
        torrent = make_layer_torrent(packed.path, piece_size=layers[-1][0].piece_size)
        manifest = _manifest(image.manifest, torrent, image.manifest.name)
        trace = to_trace(recording, read_layout(file), [layer.size for layer in manifest.layers])
        return store.add(manifest, [*layers[:-1], (torrent, packed.path)], trace)


def _manifest(manifest: Manifest, top: Torrent, name: str) -> Manifest:
    layer = Layer(top.info_hash, top.size, top.name)
    return replace(manifest, name=name, layers=(*manifest.layers[:-1], layer))


def _run(command: list[str], source: IO[bytes]) -> None:
    need(command[0], "squashfs-tools (4.5 or later)")
    done = subprocess.run(command, stdin=source, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise failure(f"{command[0]} failed: {said[-1] if said else done.returncode}", "is the disk full?")
