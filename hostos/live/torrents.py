"""Torrents of images and layers, references to images, and bundles handed from host to guest.

Everything is BitTorrent v2 only (BEP 52), without trackers, dates or comments, so that the same
content always has the same info-hash: the SHA-256 by which images and layers are known. The
formats are described in docs/images.md.

Nothing here trusts its input: torrents are accepted only in the one spelling this module would
write itself, and an image's torrent is never parsed at all but rebuilt from the image's files.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import libtorrent

from hostos.errors import UserError
from hostos.live.manifest import MAX_LAYER_SIZE, MAX_LAYERS, SCHEMA, Layer, Manifest
from hostos.live.merkle import BLOCK, HASH, FileHashes, hash_bytes, hash_file, root_of_pieces
from hostos.live.trace import Trace
from hostos.live.url import Url, parse_url

PIECE_SIZE = 64 * 1024
"""Piece size of image torrents (part of their format) and least default for layers, bytes."""
MAX_PIECE_SIZE = 16 * 1024 * 1024

IMAGE_NAME = "hostos-image"
"""Name, and so the directory, of every image torrent."""
MANIFEST_FILE = "manifest.json"
TRACE_FILE = "trace.json"
BILL_FILE = "sbom.cdx.json"
MAX_BILL = 1 << 20
"""Largest bill of materials, bytes. Nobody reads it to boot an image."""

OPTIONAL_FILES = (TRACE_FILE, BILL_FILE)

MAX_LAYER_TORRENT = 64 * 1024 * 1024
"""Largest torrent of a layer, bytes (64 MiB of piece hashes are 128 GiB in 64 KiB pieces)."""
MAX_IMAGE_SIZE = 128 * 1024 * 1024
"""Largest image torrent content, bytes: refuse to download more than this for a bare hash."""

_HASH = re.compile(r"[0-9a-fA-F]{64}")
_HASH_V1 = re.compile(r"[0-9a-fA-F]{40}|[A-Z2-7a-z]{32}")
_PIECES_ROOT = b"pieces root"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")


@dataclass(frozen=True)
class Torrent:
    """A finished .torrent. `info_hash`: v2, 64 hex digits; `size`: bytes of content."""

    data: bytes
    info_hash: str
    name: str
    size: int
    piece_size: int

    def magnet(self, peers: Iterable[str] = (), web_seeds: Iterable[str] = ()) -> str:
        """Magnet link (BEP 9, BEP 52); `peers`: `HOST:PORT` to try first (`x.pe`)."""
        return magnet(self.info_hash, peers, name=self.name, web_seeds=web_seeds)


def magnet(info_hash: str, peers: Iterable[str] = (), *, name: str = "", web_seeds: Iterable[str] = ()) -> str:
    """Magnet link of a v2 info-hash. `btmh` wants a multihash: 0x12 (SHA-256), 0x20 (32 bytes)."""
    link = f"magnet:?xt=urn:btmh:1220{info_hash}"
    if name:
        link += f"&dn={quote(name, safe='')}"
    link += "".join(f"&x.pe={quote(peer, safe=':[]')}" for peer in peers)
    return link + "".join(f"&ws={quote(url, safe=':/[]')}" for url in web_seeds)


# --- making -----------------------------------------------------------------------------------------


def make_layer_torrent(
    path: Path, *, piece_size: int = PIECE_SIZE, progress: Callable[[int], None] | None = None
) -> Torrent:
    """Torrent of the layer in `path`, named after its content (not after `path`).

    Raises UserError for an empty file or a piece size BitTorrent v2 doesn't have, OSError when the
    file can't be read.
    """
    _check_piece_size(piece_size)
    with path.open("rb") as file:
        hashes = hash_file(file, piece_size, progress)
    if not hashes.size:
        raise UserError(f"{path} is empty: not a layer")
    name = layer_file_name(hashes.sha256)
    return _write(name, {name.encode(): _file_entry(hashes)}, piece_size, [hashes])


def layer_file_name(digest: bytes) -> str:
    """Name of the file with this SHA-256 in its torrent."""
    return f"hostos-{digest.hex()[:16]}.squashfs"


def make_image_torrent(
    manifest: Manifest, layer_torrents: list[bytes], trace: bytes | None = None, bill: bytes | None = None
) -> tuple[Torrent, dict[str, bytes]]:
    """The image's torrent and the files it holds, by path. `layer_torrents`: as `manifest.layers`.

    Raises UserError if the torrents aren't those of the manifest.
    """
    files = {MANIFEST_FILE: manifest.to_json()}
    files |= {layer_path(index): data for index, data in enumerate(layer_torrents)}
    if trace is not None:
        files[TRACE_FILE] = trace
    if bill is not None:
        files[BILL_FILE] = bill
    torrent = image_torrent(files)
    verify_files(torrent.info_hash, files)
    return torrent, files


def layer_path(index: int) -> str:
    """Where an image torrent keeps the torrent of layer `index`."""
    return f"layers/{index}.torrent"


def image_torrent(files: Mapping[str, bytes]) -> Torrent:
    """The torrent over an image's `files` (paths and content alone decide its hash)."""
    tree: dict[bytes, Any] = {}
    all_hashes = []
    for path, data in sorted(files.items()):
        hashes = hash_bytes(data, PIECE_SIZE)
        *parents, name = path.encode().split(b"/")
        directory = tree
        for part in parents:
            directory = directory.setdefault(part, {})
        directory[name] = _file_entry(hashes)
        all_hashes.append(hashes)
    return _write(IMAGE_NAME, tree, PIECE_SIZE, all_hashes)


def _file_entry(hashes: FileHashes) -> dict[bytes, Any]:
    entry: dict[bytes, Any] = {b"length": hashes.size}
    if hashes.size:
        entry[_PIECES_ROOT] = hashes.root
    return {b"": entry}


def _write(name: str, tree: dict[bytes, Any], piece_size: int, files: list[FileHashes]) -> Torrent:
    info: Any = {b"file tree": tree, b"meta version": 2, b"name": name.encode(), b"piece length": piece_size}
    layers = {file.root: b"".join(file.pieces) for file in files if file.pieces}
    torrent: Any = {b"info": info, b"piece layers": layers}
    encoded: bytes = libtorrent.bencode(torrent)
    digest = sha256(libtorrent.bencode(info)).hexdigest()
    return Torrent(encoded, digest, name, sum(file.size for file in files), piece_size)


def _check_piece_size(piece_size: int) -> None:
    if type(piece_size) is not int or piece_size not in {BLOCK << n for n in range(11)}:
        raise UserError(
            f"piece size {piece_size}: not a power of two from {BLOCK} to {MAX_PIECE_SIZE} bytes",
            f"the default is {PIECE_SIZE}",
        )


# --- reading ----------------------------------------------------------------------------------------


def _bad(why: str) -> UserError:
    return UserError(f"layer torrent: {why}", "the image is damaged or was made by another program")


def parse_layer_torrent(data: bytes) -> Torrent:
    """The layer torrent in `data`, its piece hashes checked against its root.

    Accepts only what `make_layer_torrent` writes, byte for byte. Raises UserError.
    """
    if len(data) > MAX_LAYER_TORRENT:
        raise _bad(f"{len(data)} bytes, more than {MAX_LAYER_TORRENT}")
    try:
        decoded: Any = libtorrent.bdecode(data)
        if libtorrent.bencode(decoded) != data:
            raise _bad("not in canonical form")
    except (RuntimeError, ValueError, TypeError, RecursionError):
        raise _bad("not bencoded") from None
    try:
        info, layers = decoded[b"info"], decoded[b"piece layers"]
        name, piece_size, tree = info[b"name"], info[b"piece length"], info[b"file tree"]
        entry = tree[name][b""]
        size, root = entry[b"length"], entry[_PIECES_ROOT]
        exact = len(decoded) == 2 and len(tree) == 1 and len(tree[name]) == 1 and len(entry) == 2
        known = {b"file tree", b"meta version", b"name", b"piece length"}
    except (KeyError, TypeError, IndexError, AttributeError):
        raise _bad("something is missing") from None
    if not exact or set(info) != known or info[b"meta version"] != 2:
        raise _bad("not a plain BitTorrent v2 torrent of one file")
    _check_piece_size(piece_size)
    if type(size) is not int or not 0 < size <= MAX_LAYER_SIZE:
        raise _bad("its file has an impossible size")
    if not isinstance(root, bytes) or len(root) != HASH or not isinstance(layers, dict):
        raise _bad("its hashes are damaged")
    if size > piece_size:
        hashes = layers.get(root)
        count = -(-size // piece_size)
        if len(layers) != 1 or not isinstance(hashes, bytes) or len(hashes) != count * HASH:
            raise _bad("its piece hashes are missing")
        pieces = (hashes[i : i + HASH] for i in range(0, len(hashes), HASH))
        if root_of_pieces(pieces, piece_size) != root:
            raise _bad("its piece hashes don't match its root")
    elif layers:
        raise _bad("it has piece hashes of another file")
    # Layer checks the name and so keeps paths out of it.
    layer = Layer(sha256(libtorrent.bencode(info)).hexdigest(), size, name.decode("ascii", "replace"))
    return Torrent(data, layer.torrent, layer.file, size, piece_size)


# --- references -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What a person gives to name an image: its hash, perhaps `HOST:PORT` peers, and addresses of web seeds."""

    info_hash: str
    peers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()


def parse_image_reference(text: str) -> Reference:
    """Reads 64 hex digits, or a v2 magnet link with any number of `x.pe` peers and `ws` web seeds.

    Other magnet parameters (name, trackers) are ignored. Raises UserError.
    """
    text = text.strip()
    if _HASH.fullmatch(text):
        return Reference(check_hash(text.lower()))
    if not text.lower().startswith("magnet:"):
        raise _bad_reference(text)
    try:
        query = parse_qsl(
            urlsplit(text).query,
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=1000,
        )
    except ValueError:
        raise _bad_reference(text) from None
    topics = [value for key, value in query if key == "xt" or key.startswith("xt.")]
    hashes = {
        topic[len("urn:btmh:1220") :].lower()
        for topic in topics
        if topic.lower().startswith("urn:btmh:1220") and _HASH.fullmatch(topic[len("urn:btmh:1220") :])
    }
    if len(hashes) != 1:
        if any(topic.lower().startswith("urn:btih:") for topic in topics) and not hashes:
            raise UserError(
                "this magnet link has only a BitTorrent v1 hash (btih)",
                "images are named by the v2 hash: magnet:?xt=urn:btmh:1220<64 hex digits>",
            )
        raise UserError(
            f"this magnet link names {len(hashes)} images",
            "a link to an image has one xt=urn:btmh:1220<64 hex digits>",
        )
    peers = tuple(dict.fromkeys(parse_peer(value) for key, value in query if key == "x.pe"))
    web_seeds = tuple(dict.fromkeys(str(parse_web_seed(value)) for key, value in query if key == "ws"))
    return Reference(check_hash(hashes.pop()), peers, web_seeds)


def check_hash(image: str) -> str:
    """`image` (64 hex digits) itself. Raises UserError for zeros alone: to libtorrent they mean that there is none."""
    if not image.strip("0"):
        raise UserError("a hash of nothing but zeros is no image's", "copy all of what `hostos image publish` printed")
    return image


def parse_web_seed(text: str) -> Url:
    """The address of a web seed: `http[s]://HOST[:PORT][/PATH]`. Raises UserError."""
    try:
        return parse_url(text, "http://192.0.2.7/hostos")
    except UserError as error:
        raise UserError(f"web seed: {error.message}", error.hint) from None


def parse_peer(text: str) -> str:
    """`HOST:PORT` or `[IPv6]:PORT`, normalised. Raises UserError."""
    host, colon, port = text.strip().rpartition(":")
    if colon and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536:
        if host.startswith("[") and host.endswith("]"):
            try:
                return f"[{ipaddress.IPv6Address(host[1:-1])}]:{int(port)}"
            except ValueError:
                pass
        elif _HOST.fullmatch(host):
            return f"{host.lower()}:{int(port)}"
    raise UserError(f"not a peer's address: {text[:80]!r}", "write HOST:PORT, e.g. --peer 192.168.1.5:6881")


def _bad_reference(text: str) -> UserError:
    if _HASH_V1.fullmatch(text):
        why = "that is a BitTorrent v1 hash; an image is named by its v2 hash of 64 hex digits"
        return UserError(f"not an image: {text}", why)
    if re.fullmatch(r"[0-9a-fA-F]+", text):
        return UserError(
            f"not an image: {text[:80]!r} has {len(text)} hex digits instead of 64",
            "copy all of what `hostos image publish` printed; `hostos image ls` shows this host's images",
        )
    return UserError(
        f"not an image: {text[:80]!r}",
        "give the 64 hex digits `hostos image publish` printed, or a magnet link with urn:btmh",
    )


# --- bundles ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageBundle:
    """An image's metadata, all of it verified against `image`, its hash.

    `files`: content by path; `layers`: as `manifest.layers`; `trace`: the boot trace, if it has one.
    """

    image: str
    manifest: Manifest
    torrent: Torrent
    files: dict[str, bytes]
    layers: tuple[Torrent, ...]
    trace: Trace | None

    def to_json(self) -> bytes:
        """What the host hands over (`verify_bundle` reads it): one line of JSON."""
        files = {path: base64.b64encode(data).decode() for path, data in self.files.items()}
        torrent = base64.b64encode(self.torrent.data).decode()
        bundle = {"schema": SCHEMA, "image": self.image, "files": files, "torrent": torrent}
        return json.dumps(bundle, sort_keys=True, separators=(",", ":")).encode()


def verify_files(image: str, files: Mapping[str, bytes]) -> ImageBundle:
    """Check that `files` are exactly those of the image with the hash `image` and are sound.

    The torrent is rebuilt from the files, so its hash proves all of them. Raises UserError.
    """
    if sum(len(data) for data in files.values()) > MAX_IMAGE_SIZE:
        raise _bad_bundle(f"more than {MAX_IMAGE_SIZE} bytes")
    if not files.keys() <= {*OPTIONAL_FILES, MANIFEST_FILE, *(layer_path(n) for n in range(MAX_LAYERS))}:
        raise _bad_bundle("it has files that no image has")
    if len(files.get(BILL_FILE, b"")) > MAX_BILL:
        raise _bad_bundle(f"its bill of materials is larger than {MAX_BILL} bytes")
    torrent = image_torrent(files)
    if torrent.info_hash != image:
        raise _bad_bundle(f"its content has the hash {torrent.info_hash} instead of {image}")
    if MANIFEST_FILE not in files:
        raise _bad_bundle(f"it has no {MANIFEST_FILE}")
    manifest = Manifest.parse(files[MANIFEST_FILE])
    if files.keys() - {*OPTIONAL_FILES, MANIFEST_FILE} != {layer_path(n) for n in range(len(manifest.layers))}:
        raise _bad_bundle("its layers aren't those of its manifest")
    layers = []
    for index, layer in enumerate(manifest.layers):
        found = parse_layer_torrent(files[layer_path(index)])
        if replace(layer, torrent=found.info_hash, size=found.size, file=found.name) != layer:
            raise _bad_bundle(f"the torrent of layer {index} isn't the one its manifest names")
        layers.append(found)
    trace = None
    if TRACE_FILE in files:
        trace = Trace.parse(files[TRACE_FILE], [layer.size for layer in manifest.layers])
    return ImageBundle(image, manifest, torrent, dict(files), tuple(layers), trace)


def verify_bundle(bundle: bytes | Mapping[str, Any], *, image: str | None = None) -> ImageBundle:
    """The verified image in `bundle` (JSON, or its decoded object).

    `image`: the hash that was asked for; a bundle of any other image is refused. Raises UserError.
    """
    if isinstance(bundle, bytes):
        if len(bundle) > 2 * MAX_IMAGE_SIZE:
            raise _bad_bundle("it is too large")
        try:
            bundle = json.loads(bundle.decode())
        except (ValueError, RecursionError):
            raise _bad_bundle("it is not JSON") from None
    if not isinstance(bundle, Mapping):
        raise _bad_bundle("it is not an object")
    if bundle.get("schema") != SCHEMA or type(bundle["schema"]) is not int:
        raise UserError(
            f"image bundle: schema {str(bundle.get('schema'))[:20]}, this side knows {SCHEMA}",
            "host and guest are of different versions: update the older one",
        )
    if not bundle.keys() <= {"schema", "image", "files", "torrent"}:
        raise _bad_bundle("it has unknown keys")
    claimed, files = bundle.get("image"), bundle.get("files")
    if not isinstance(claimed, str) or not re.fullmatch(r"[0-9a-f]{64}", claimed):
        raise _bad_bundle("its hash is malformed")
    if image is not None and claimed != image:
        raise _bad_bundle(f"it is of {claimed} instead of {image}")
    if not isinstance(files, dict) or len(files) > MAX_LAYERS + 2:
        raise _bad_bundle("its files are malformed")
    verified = verify_files(claimed, {str(path): _decode(data) for path, data in files.items()})
    if "torrent" in bundle and _decode(bundle["torrent"]) != verified.torrent.data:
        raise _bad_bundle("its torrent isn't the image's")
    return verified


def _decode(text: Any) -> bytes:
    if not isinstance(text, str):
        raise _bad_bundle("a file is not base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _bad_bundle("a file is not base64") from None


def _bad_bundle(why: str) -> UserError:
    return UserError(f"image bundle: {why}", "fetch or publish the image again")
