"""From a tree to an image in the store, and its hash."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError, failure
from hostos.image.layout import read_layout
from hostos.image.pack import Packed, kind_of, pack
from hostos.image.recording import Recording, to_trace
from hostos.image.store import Store
from hostos.live.manifest import BootConfig, Layer, Manifest, check_name
from hostos.live.torrents import MAX_PIECE_SIZE, PIECE_SIZE, make_layer_torrent
from hostos.steps import Steps


@dataclass(frozen=True)
class Published:
    """`hash`: the image's v2 info-hash; `layer`: that of its layer."""

    hash: str
    layer: str
    packed: Packed


def publish(
    source: Path,
    name: str,
    steps: Steps,
    *,
    boot: BootConfig | None = None,
    architecture: str | None = None,
    piece_size: int | None = None,
    recording: Recording | None = None,
    store: Store | None = None,
) -> Published:
    """Pack `source`, store it as an image and return its hash. Announces nothing to anybody.

    `piece_size`: bytes (None: by the size of the layer).

    The same tree, name, boot configuration and `recording` (of a boot, whose order is then used) give
    the same hash. Raises UserError.
    """
    store = store or Store()
    boot = boot or BootConfig()
    # Everything that can be wrong is, before a minute is spent on packing.
    check_name(name)
    if recording and kind_of(source) == "squashfs":
        raise UserError(
            f"{source} is a squashfs file, which is taken as it is: it can't be sorted",
            "publish it, then: hostos image trace NAME --recording FILE",
        )
    Manifest(name, "x86_64", (Layer("0" * 64, 1, f"hostos-{'0' * 16}.squashfs"),), boot).to_json()
    try:
        with store.incoming() as temporary:
            file = temporary / "layer.squashfs"
            order = recording.order() if recording else None
            packed = pack(source, file, steps, architecture=architecture, order=order)
            if piece_size is None:
                piece_size = default_piece_size(packed.size)
            with steps.step("hash") as step:
                torrent = make_layer_torrent(
                    packed.path,
                    piece_size=piece_size,
                    progress=lambda done: step.progress(f"{done >> 20} of {packed.size >> 20} MiB"),
                )
                step.detail = f"{-(-packed.size // piece_size)} pieces of {piece_size >> 10} KiB"
            layer = Layer(torrent.info_hash, torrent.size, torrent.name)
            manifest = Manifest(name, packed.architecture, (layer,), boot)
            trace = to_trace(recording, read_layout(packed.path), [layer.size]) if recording else None
            image = store.add(manifest, [(torrent, packed.path)], trace)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise failure(f"publishing {source}: {where}{error.strerror}", f"look at {store.root}") from error
    return Published(image, torrent.info_hash, packed)


def default_piece_size(size: int) -> int:
    """Piece size for a layer of `size` bytes: 64 KiB, until its hashes alone become large.

    Larger pieces mean more bytes for each scattered read (128 KiB: an eighth more time to boot over 50
    Mbit/s, 256 KiB: a third), smaller ones a larger torrent, which must be there before the first read:
    32 bytes for each piece, so half a MiB (84 ms at 50 Mbit/s) for 1 GiB. From there on it grows half
    as fast as the layer: 1 MiB for 4 GiB in pieces of 128 KiB, 2 MiB for 16 GiB in pieces of 256 KiB.
    """
    piece_size = PIECE_SIZE
    while size > (1 << 30) * (piece_size // PIECE_SIZE) ** 2 and piece_size < MAX_PIECE_SIZE:
        piece_size *= 2
    return piece_size


def boot_config(
    *,
    command: str = "",
    env: tuple[str, ...] = (),
    user: str = "",
    workdir: str = "",
    ports: tuple[str, ...] = (),
) -> BootConfig:
    """A BootConfig from the words of a command line: `command` as a shell would split it (nothing is
    expanded), `env` as KEY=VALUE, `ports` as N, N/tcp or N/udp. Raises UserError."""
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UserError(f"--command {command!r}: {error}", "quote it as for a shell") from None
    pairs = []
    for item in env:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--env {item!r} is not KEY=VALUE", f"e.g. --env {key or 'LANG'}=C.UTF-8")
        pairs.append((key, value))
    full = tuple(port if "/" in port else f"{port}/tcp" for port in ports)
    try:
        return BootConfig(words, tuple(pairs), user, workdir, full)
    except UserError as error:
        raise UserError(error.message.replace("image manifest: ", "")) from None
