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
from pathlib import Path
from typing import IO

from hostos.errors import UserError, failure
from hostos.image.layout import Layout, read_layout
from hostos.image.pack import BLOCK_SIZE, pack
from hostos.image.recording import Recording, to_trace
from hostos.image.store import Store, StoredImage
from hostos.live.manifest import Layer, Manifest
from hostos.live.torrents import Torrent, make_layer_torrent, parse_layer_torrent
from hostos.steps import Steps

TWIN_NAME = "hostos/tracing"


def torrents(store: Store, image: StoredImage) -> list[tuple[Torrent, Path]]:
    """The image's layers, lowest first, as `Store.add` takes them. Raises UserError if some are missing."""
    if image.missing:
        raise UserError(f"layers of image {image.name} are missing in the store", "publish it again")
    return [
        (parse_layer_torrent((image.directory / "layers" / f"{number}.torrent").read_bytes()), store.layer_path(layer))
        for number, layer in enumerate(image.manifest.layers)
    ]


@contextmanager
def twin(store: Store, image: StoredImage, steps: Steps) -> Iterator[tuple[str, Layout]]:
    """The image's twin, in the store as long as the context: its hash, and its top layer's layout."""
    layers = torrents(store, image)
    with store.incoming() as temporary:
        file = temporary / "layer.squashfs"
        with steps.step("copy without compression") as step:
            with _as_tar(layers[-1][1]) as source:
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
            with _as_tar(layers[-1][1]) as source, tree.open("wb") as target:
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


@contextmanager
def _as_tar(layer: Path) -> Iterator[IO[bytes]]:
    """The tree of a squashfs file as a tar stream, its root's own attributes included."""
    _need("sqfs2tar", "squashfs-tools-ng")
    command = ["sqfs2tar", "--no-skip", "--root-becomes", ".", str(layer)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            raise
        said = process.stderr.read().decode(errors="replace").strip()
        if process.wait():
            raise failure(f"{layer} can't be unpacked: {said.splitlines()[-1] if said else 'sqfs2tar failed'}")


def _run(command: list[str], source: IO[bytes]) -> None:
    _need(command[0], "squashfs-tools (4.5 or later)")
    done = subprocess.run(command, stdin=source, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise failure(f"{command[0]} failed: {said[-1] if said else done.returncode}", "is the disk full?")


def _need(program: str, package: str) -> None:
    if not shutil.which(program):
        raise UserError(f"{program} is needed to trace an image", f"install {package}")
