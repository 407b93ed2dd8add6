"""OCI images into the store, and the bill of materials of any image."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from hostos.errors import UserError
from hostos.image import oci
from hostos.image.bill import bill_of
from hostos.image.child import pack_layer, storing
from hostos.image.entries import Entry
from hostos.image.layers import read_image
from hostos.image.overlay import merge
from hostos.image.pack import architecture_of
from hostos.image.store import Store, StoredImage
from hostos.live.manifest import MAX_HISTORY, Layer, Manifest, check_name
from hostos.live.torrents import BILL_FILE, Torrent
from hostos.steps import Steps

LEVEL = 3
"""zstd's for imported layers: who imports waits for it. A Debian of 395 MiB takes 10 s of a processor, all in all,
instead of 100 s, and 148 MiB instead of 129."""


def import_oci(
    source: Path, name: str, tag: str, steps: Steps, store: Store | None = None, *, level: int = LEVEL
) -> tuple[StoredImage, int]:
    """Publish an OCI image; and how many bytes of it are new here. Raises UserError; then nothing is stored."""
    store = store or Store()
    check_name(name)
    if not source.exists():
        raise UserError(f"{source} does not exist", "give an OCI layout or archive")
    with ExitStack() as stack, storing(store, name), store.incoming() as temporary:
        image = oci.read(source, tag, stack, steps)
        layers: list[tuple[Torrent, Path]] = []
        texts = []
        trees: list[list[Entry]] = []
        for number, (text, entries) in enumerate(image.layers(stack)):
            found = architecture_of(entries)
            if found and found != image.architecture:
                steps.warning(f"layer {number} has programs for {found}, the image says {image.architecture}")
            file = temporary / f"layer{number}"
            torrent, packed = pack_layer(entries, file, image.architecture, steps, level=level)
            trees.append(entries)
            if layers and layers[-1][0].info_hash == torrent.info_hash:
                continue  # twice the same on top of itself
            layers.append((torrent, packed.path))
            texts.append(text[:MAX_HISTORY])
        if not layers:
            raise UserError(f"{source}: an image without a file", "there is nothing to boot in it")
        entries_of = tuple(Layer(torrent.info_hash, torrent.size, torrent.name) for torrent, _ in layers)
        manifest = Manifest(name, image.architecture, entries_of, image.boot, history=tuple(texts))
        known = {layer.torrent for each in store.images() for layer in each.manifest.layers}
        new = sum(layer.size for layer in entries_of if layer.torrent not in known)
        made = store.add(manifest, layers, bill=bill_of(merge(trees), manifest, {}))
    return store.get(made), new


def bill(reference: str, steps: Steps, store: Store | None = None) -> bytes:
    """The image's bill of materials: the one it carries, or one made from its tree. Raises UserError."""
    store = store or Store()
    found = store.get(reference)
    carried = store.bundle(found.hash).files.get(BILL_FILE)
    if carried is not None:
        return carried
    with ExitStack() as stack:
        return bill_of(read_image(store, found, stack, steps), found.manifest, {})
