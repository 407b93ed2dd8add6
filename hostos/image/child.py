"""Images made from other images: a child is its parent's layers, untouched, and a new one on top."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hostos.errors import UserError, failure
from hostos.image import acls, overlay
from hostos.image.entries import Entry, arrange
from hostos.image.layers import check_plain, layers_shared, read_image, read_layer, torrents
from hostos.image.pack import LEVEL, Packed, architecture_of, kind_of, pack_entries
from hostos.image.publish import Published, default_piece_size
from hostos.image.sources import read_directory, read_tar
from hostos.image.store import Store, StoredImage
from hostos.live.manifest import MAX_HISTORY, MAX_LAYERS, MAX_PARENTS, BootConfig, Layer, Manifest, check_name
from hostos.live.torrents import Torrent, make_layer_torrent
from hostos.steps import Steps


def publish_child(
    source: Path,
    name: str,
    parent: StoredImage,
    steps: Steps,
    *,
    boot: BootConfig | None = None,
    only_changes: bool = False,
    piece_size: int | None = None,
    made_by: str = "",
    store: Store | None = None,
) -> Published:
    """Publish `source` (directory, tar or squashfs file) as a child of `parent`; the parent's layers are shared.

    `only_changes`: `source` is not the whole tree but the upper directory of an overlay, whiteouts
    and all. Without `boot` the child boots as its parent does. Raises UserError.
    """
    store = store or Store()
    check_name(name)
    with ExitStack() as stack:
        if only_changes:
            changes = arrange(overlay.from_upper(_read(source, stack, steps)), str(source))
            entries = acls.absorbed(changes, str(source))
        else:
            below = read_image(store, parent, stack, steps)
            given = acls.absorbed(arrange(_read(source, stack, steps), str(source)), str(source))
            whole = overlay.merge([given])
            with steps.step("compare") as step:
                entries = overlay.difference(below, whole)
                step.detail = f"{len(entries)} of {len(whole)} entries differ"
            if not entries:
                raise UserError(f"{source} is the same as {parent.name}: nothing to publish")
        return add_layer(
            store,
            parent,
            entries,
            name,
            steps,
            boot=boot or parent.manifest.boot,
            made_by=made_by or f"publish {source.name}",
            piece_size=piece_size,
        )


def _read(source: Path, stack: ExitStack, steps: Steps) -> list[Entry]:
    kind = kind_of(source)
    if kind == "directory":
        return read_directory(source, steps)
    return read_tar(source, stack, steps) if kind == "tar" else read_layer(source.absolute(), stack)


def add_layer(
    store: Store,
    parent: StoredImage | None,
    entries: list[Entry],
    name: str,
    steps: Steps,
    *,
    boot: BootConfig,
    made_by: str,
    architecture: str | None = None,
    piece_size: int | None = None,
) -> Published:
    """An image of `parent`'s layers with one of `entries` (arranged) on top; without parent, its first.

    A child inherits the boot trace. Raises UserError: too many layers, programs for another
    architecture.
    """
    if parent:
        check_plain(parent)
    below = parent.manifest if parent else None
    check_depth(len(below.layers) + 1 if below else 1, parent.name if parent else name)
    own = architecture_of(entries)
    wanted = architecture or (below.architecture if below else None)
    if wanted is None and own is None:
        raise UserError(f"no program in {name} tells its architecture", "say it: --arch x86_64")
    if below and own and own != below.architecture:
        raise UserError(
            f"{name} has programs for {own}, but its parent {below.name} is for {below.architecture}",
            f"make it from an image for {own}",
        )
    with storing(store, name), store.incoming() as temporary:
        torrent, packed = pack_layer(entries, temporary / "layer.squashfs", wanted or own or "", steps, piece_size)
        layer = Layer(torrent.info_hash, torrent.size, torrent.name)
        kept = torrents(store, parent) if parent else []
        if below and layer in below.layers:
            raise UserError(f"the new layer of {name} is one its parent has: nothing to publish")
        manifest = Manifest(
            name,
            packed.architecture,
            (*(below.layers if below else ()), layer),
            boot,
            parents=lineage(parent),
            history=(*_history(below), made_by[:MAX_HISTORY]),
        )
        trace = parent.directory / "trace.json" if parent else None
        inherited = trace.read_bytes() if trace and trace.exists() else None
        image = store.add(manifest, [*kept, (torrent, packed.path)], inherited)
    return Published(image, torrent.info_hash, packed)


@contextmanager
def storing(store: Store, name: str) -> Iterator[None]:
    """What the disk refuses while `name` is stored becomes a failure that says so."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise failure(f"storing {name}: {where}{error.strerror}", f"look at {store.root}") from error


def pack_layer(
    entries: list[Entry],
    file: Path,
    architecture: str,
    steps: Steps,
    piece_size: int | None = None,
    level: int = LEVEL,
) -> tuple[Torrent, Packed]:
    """`entries` as a layer in `file`, compressed with zstd's `level`, and its torrent."""
    packed = pack_entries(entries, file, architecture, steps, level=level)
    torrent = make_layer_torrent(packed.path, piece_size=piece_size or default_piece_size(packed.size))
    return torrent, packed


def lineage(parent: StoredImage | None) -> tuple[str, ...]:
    return (parent.hash, *parent.manifest.parents)[:MAX_PARENTS] if parent else ()


def _history(manifest: Manifest | None) -> tuple[str, ...]:
    if manifest is None:
        return ()
    return manifest.history or ("",) * len(manifest.layers)


def check_depth(layers: int, name: str) -> None:
    """Raises UserError if an image can't have so many."""
    if layers > MAX_LAYERS:
        raise UserError(
            f"that would be {layers} layers; an image has at most {MAX_LAYERS}", f"hostos image squash {name} first"
        )


def squash(
    store: Store,
    image: StoredImage,
    steps: Steps,
    *,
    name: str | None = None,
    down_to: StoredImage | None = None,
) -> Published:
    """The same tree with fewer layers: one, or one above those of the ancestor `down_to`. Raises UserError."""
    name = check_name(name or image.name)
    kept = layers_shared(image, down_to) if down_to else 0
    if len(image.manifest.layers) - kept < 2:
        raise UserError(f"{image.name} has nothing to squash", f"see: hostos image history {image.name}")
    with ExitStack() as stack:
        tree = read_image(store, image, stack, steps)
        entries = tree.entries()
        if kept:
            entries = overlay.difference(read_image(store, image, stack, steps, up_to=kept), tree)
        return add_layer(
            store,
            down_to,
            entries,
            name,
            steps,
            boot=image.manifest.boot,
            made_by=f"squash of {len(image.manifest.layers) - kept} layers",
            architecture=image.manifest.architecture,
        )


def diff(store: Store, image: StoredImage, other: StoredImage | None, steps: Steps) -> list[tuple[str, bytes]]:
    """How the tree of `image` differs from that of `other` (None: from what is below its top layer)."""
    with ExitStack() as stack:
        above = read_image(store, image, stack, steps)
        if other is not None:
            below = read_image(store, other, stack, steps)
        elif len(image.manifest.layers) > 1:
            below = read_image(store, image, stack, steps, up_to=len(image.manifest.layers) - 1)
        else:
            below = overlay.merge([])
        return list(overlay.changes(below, overlay.difference(below, above)))
