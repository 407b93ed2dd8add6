"""What a CID names, and whether it can be booted: an image as `hostos image publish --ipfs` lays it out, a
squashfs file, or a plain directory tree.

Only the blocks on the way to the first bytes are fetched for that. Nothing is believed that is not proved
by the CID, and what is proved is still checked like any image from a stranger.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from hostos.errors import UserError, failure
from hostos.live import cid as cids
from hostos.live import unixfs
from hostos.live.blocks import Blocks
from hostos.live.cid import Cid
from hostos.live.dagpb import BlockError, Link
from hostos.live.gateways import Gateways
from hostos.live.ipfs_source import piece_size
from hostos.live.manifest import MAX_LAYER_SIZE, MAX_MANIFEST, Layer, Manifest
from hostos.live.source import SourceError
from hostos.live.torrents import MANIFEST_FILE, TRACE_FILE
from hostos.live.trace import MAX_TRACE, Trace
from hostos.live.unixfs import Directory, File, Symlink
from hostos.live.url import Url, parse_gateway

SQUASHFS = b"hsqs"
_OTHER = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"QFI\xfb": "qcow2"}


@dataclass(frozen=True)
class IpfsLayer:
    """A squashfs file. `gateways`: who is asked for it; the rest as a layer's torrent has it."""

    cid: Cid
    root: File
    piece_size: int
    gateways: tuple[Url, ...]

    @property
    def info_hash(self) -> str:
        """What it is known by on this machine."""
        return str(self.cid)

    @property
    def size(self) -> int:
        return self.root.size


@dataclass(frozen=True)
class IpfsTree:
    """A directory tree, shown as it is. `owner`: the user all of it belongs to."""

    cid: Cid
    root: Directory
    size: int
    gateways: tuple[Url, ...]
    owner: int = 0
    piece_size: int = 64 * 1024

    @property
    def info_hash(self) -> str:
        return f"{self.cid}-{self.owner}"


@dataclass(frozen=True)
class IpfsImage:
    """What `torrents.ImageBundle` is for an image known by its info-hash. `image`: the CID."""

    image: str
    manifest: Manifest
    layers: tuple[IpfsLayer | IpfsTree, ...]
    trace: Trace | None = None


async def load(blocks: Blocks, image: str, gateways: Iterable[str], deadline: float) -> IpfsImage:
    """The image with this CID, its metadata fetched from `gateways` (addresses) unless it is in the cache.

    Raises UserError: not reached within `deadline` seconds, or nothing that could be booted.
    """
    name = cids.parse(image)
    urls = tuple(parse_gateway(text) for text in gateways)
    if not urls:
        raise UserError(f"no gateway is known that could have {image}", "name one: --gateway http://HOST:PORT")
    asked = Gateways(urls)

    async def fetch(wanted: Cid) -> bytes:
        return await blocks.get(wanted, asked, deadline)

    try:
        root = unixfs.decode(name, await fetch(name))
        if isinstance(root, File):
            return await _of_file(name, root, urls, fetch)
        if isinstance(root, Symlink):
            raise _no_image(name, "a symbolic link")
        entries = await unixfs.entries(root, fetch)
        if MANIFEST_FILE.encode() in entries and b"layers" in entries:
            return await _of_directory(name, entries, urls, fetch)
        return _of_tree(name, root, entries, urls)
    except SourceError as error:
        raise failure(
            f"image {image[:16]}…: {error.strerror}",
            "is the node running and the image on it? Name another gateway with --gateway URL",
        ) from None
    except BlockError as error:
        raise UserError(f"{name} is no image: {error}") from None
    finally:
        await asked.close()


def _no_image(name: Cid, what: str) -> UserError:
    return UserError(
        f"{name} is no image but {what}",
        "give the CID `hostos image publish --ipfs` printed, or that of a squashfs file or a root directory",
    )


async def _of_file(name: Cid, root: File, urls: tuple[Url, ...], fetch: unixfs.Fetch) -> IpfsImage:
    layer = await _layer(name, root, urls, fetch)
    return IpfsImage(str(name), _plain(name, root.size), (layer,))


async def _layer(
    name: Cid, root: File, urls: tuple[Url, ...], fetch: unixfs.Fetch, *, encrypted: bool = False
) -> IpfsLayer:
    if encrypted:
        return IpfsLayer(name, root, await piece_size(root, fetch), urls)
    head = await unixfs.read(root, 0, 96, fetch)
    if len(head) < 96 or not head.startswith(SQUASHFS):
        kind = next((kind for magic, kind in _OTHER.items() if head.startswith(magic)), "")
        what = f"a file compressed with {kind}" if kind else f"a file of {root.size} bytes that is no squashfs"
        raise _no_image(name, what)
    (used,) = struct.unpack_from("<Q", head, 40)  # bytes_used of the superblock
    if not used <= root.size <= MAX_LAYER_SIZE:
        raise _no_image(name, "a squashfs file that was cut off")
    return IpfsLayer(name, root, await piece_size(root, fetch), urls)


async def _of_directory(name: Cid, entries: dict[bytes, Link], urls: tuple[Url, ...], fetch: unixfs.Fetch) -> IpfsImage:
    """As `hostos.image.ipfs` lays it out."""
    manifest = Manifest.parse(await _small(entries[MANIFEST_FILE.encode()], MAX_MANIFEST, fetch))
    place = unixfs.decode(entries[b"layers"].cid, await fetch(entries[b"layers"].cid))
    found = await unixfs.entries(place, fetch) if isinstance(place, Directory) else {}
    layers = []
    for number, layer in enumerate(manifest.layers):
        link = found.get(b"%d.squashfs" % number)
        if link is None:
            raise UserError(
                f"{name} is an image without its layer {number}", "add it again: hostos image publish --ipfs"
            )
        root = unixfs.decode(link.cid, await fetch(link.cid))
        if not isinstance(root, File) or root.size != layer.size:
            raise UserError(f"{name} is no image: layer {number} is not what its manifest says")
        layers.append(await _layer(link.cid, root, urls, fetch, encrypted=bool(layer.cipher)))
    trace = None
    if link := entries.get(TRACE_FILE.encode()):
        trace = Trace.parse(await _small(link, MAX_TRACE, fetch), [layer.size for layer in layers])
    return IpfsImage(str(name), manifest, tuple(layers), trace)


async def _small(link: Link, limit: int, fetch: unixfs.Fetch) -> bytes:
    root = unixfs.decode(link.cid, await fetch(link.cid))
    if not isinstance(root, File) or root.size > limit:
        raise BlockError(f"its {link.name.decode('ascii', 'replace')} is no file of at most {limit} bytes")
    return await unixfs.read(root, 0, root.size, fetch)


def _of_tree(name: Cid, root: Directory, entries: dict[bytes, Link], urls: tuple[Url, ...]) -> IpfsImage:
    if not entries.keys() & {b"bin", b"usr", b"sbin", b"etc"}:
        raise _no_image(name, f"a directory of {len(entries)} entries, none of them bin, usr, sbin or etc")
    size = max(1, min(sum(link.size for link in entries.values()), MAX_LAYER_SIZE))
    return IpfsImage(str(name), _plain(name, size), (IpfsTree(name, root, size, urls),))


def _plain(name: Cid, size: int) -> Manifest:
    """Of something that says nothing of itself."""
    digest = (name.digest + bytes(32))[:32].hex()
    return Manifest(f"ipfs-{str(name)[-8:]}", "any", (Layer(digest, max(1, size), f"hostos-{digest[:16]}.squashfs"),))
