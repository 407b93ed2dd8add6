"""The trees of stored layers, read without mounting anything (and so without root)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from hostos.errors import UserError, failure
from hostos.image import acls
from hostos.image.entries import Entry, arrange
from hostos.image.overlay import Tree, merge
from hostos.image.sources import read_plain_tar
from hostos.image.store import Store, StoredImage
from hostos.live.torrents import Torrent, parse_layer_torrent
from hostos.steps import Steps

_CHUNK = 1 << 20


def torrents(store: Store, image: StoredImage) -> list[tuple[Torrent, Path]]:
    """The image's layers, lowest first, as `Store.add` takes them. Raises UserError if some are missing."""
    if image.missing:
        raise UserError(f"layers of image {image.name} are missing in the store", "publish it again")
    return [
        (parse_layer_torrent((image.directory / "layers" / f"{number}.torrent").read_bytes()), store.layer_path(layer))
        for number, layer in enumerate(image.manifest.layers)
    ]


def check_plain(image: StoredImage) -> None:
    """Raises UserError for a private image: its layers can't be read here, and a child would not be private."""
    if any(layer.cipher for layer in image.manifest.layers):
        raise UserError(f"{image.name} is private: its layers are encrypted", "work with the image it was made from")


def read_layer(path: Path, stack: ExitStack) -> list[Entry]:
    """All entries of a layer, its root's own included, arranged; contents can be read while `stack` is open.

    Holes of sparse files are read as zeros, which take no space here. Raises UserError for a file that can't be
    unpacked.
    """
    directory = os.environ.get("TMPDIR", "/var/tmp")
    spool = cast(BinaryIO, tempfile.TemporaryFile(dir=directory))  # noqa: SIM115
    stack.enter_context(spool)
    with as_tar(path) as source:
        try:
            _copy(source, spool)
        except OSError as error:
            hint = "set TMPDIR to a directory with more space"
            raise failure(f"unpacking {path.name}: {error.strerror}", hint) from None
    spool.seek(0)
    entries, _ = read_plain_tar(spool, path, stack)
    return acls.absorbed(arrange(entries, str(path)), str(path))


def _copy(source: IO[bytes], spool: BinaryIO) -> None:
    """All of it, zeros as holes: a layer of a few bytes may have files of terabytes that are nothing else."""
    while data := source.read(_CHUNK):
        if data.count(0) == len(data):
            spool.seek(len(data), os.SEEK_CUR)
        else:
            spool.write(data)
    spool.truncate()


def read_image(store: Store, image: StoredImage, stack: ExitStack, steps: Steps, *, up_to: int | None = None) -> Tree:
    """The tree its layers make together; `up_to`: only the lowest so many. Raises UserError."""
    check_plain(image)
    layers = torrents(store, image)[:up_to]
    with steps.step(f"read {image.name}") as step:
        tree = merge([read_layer(path, stack) for _, path in layers])
        step.detail = f"{len(layers)} layers, {len(tree)} entries"
    return tree


def layers_shared(image: StoredImage, ancestor: StoredImage) -> int:
    """How many of the image's lowest layers are all those of `ancestor`. Raises UserError if it isn't one."""
    count = len(ancestor.manifest.layers)
    if image.manifest.layers[:count] != ancestor.manifest.layers:
        raise UserError(f"{image.name} is not made from {ancestor.name}", f"see: hostos image history {image.name}")
    return count


@contextmanager
def as_tar(layer: Path) -> Iterator[IO[bytes]]:
    """The tree of a squashfs file as a tar stream, its root's own attributes included."""
    need("sqfs2tar", "squashfs-tools-ng")
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


def need(program: str, package: str) -> None:
    """Raises UserError if `program` is not installed."""
    if not shutil.which(program):
        raise UserError(f"{program} is needed for this", f"install {package}")
