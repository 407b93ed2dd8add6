"""SHA-256 trees over files as BitTorrent v2 defines them (BEP 52).

Written here rather than taken from libtorrent because identity must not depend on the version of
a library, and because bundles are checked in memory, before anything of them touches a disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from typing import BinaryIO

BLOCK = 16 * 1024
HASH = 32
_READ = 1 << 20


@dataclass(frozen=True)
class FileHashes:
    """`root` of the whole file; `pieces`: one hash per piece, only if there is more than one."""

    size: int
    root: bytes
    pieces: tuple[bytes, ...]
    sha256: bytes


def _pair(left: bytes, right: bytes) -> bytes:
    return sha256(left + right).digest()


def _fold(hashes: Iterable[bytes], pad: bytes, width: int | None = None) -> bytes:
    """Root over `hashes`, filled up with `pad` to `width` leaves or else to a power of two."""
    level = list(hashes)
    target = width or 1 << max(0, len(level) - 1).bit_length()
    while target > 1:
        if len(level) % 2:
            level.append(pad)
        level = [_pair(level[i], level[i + 1]) for i in range(0, len(level), 2)]
        pad, target = _pair(pad, pad), target // 2
    return level[0]


def _zero_piece(piece_size: int) -> bytes:
    """Hash that stands for a piece beyond the end of the file."""
    pad = bytes(HASH)
    for _ in range((piece_size // BLOCK).bit_length() - 1):
        pad = _pair(pad, pad)
    return pad


def root_of_pieces(pieces: Iterable[bytes], piece_size: int) -> bytes:
    """The file's root, from its piece hashes (more than one)."""
    return _fold(pieces, _zero_piece(piece_size))


def hash_file(file: BinaryIO, piece_size: int, progress: Callable[[int], None] | None = None) -> FileHashes:
    """Read `file` once and hash it. `piece_size`: a power of two, at least 16 KiB.

    `progress` is called with the bytes read so far about once per MiB.
    """
    per_piece = piece_size // BLOCK
    whole, size = sha256(), 0
    pieces: list[bytes] = []
    blocks: list[bytes] = []
    while data := file.read(_READ):
        whole.update(data)
        size += len(data)
        for start in range(0, len(data), BLOCK):
            if len(blocks) == per_piece:
                pieces.append(_fold(blocks, bytes(HASH), per_piece))
                blocks.clear()
            blocks.append(sha256(data[start : start + BLOCK]).digest())
        if progress:
            progress(size)
    if not pieces:
        # One piece or less: the tree is only as high as the file needs.
        return FileHashes(size, _fold(blocks, bytes(HASH)) if blocks else b"", (), whole.digest())
    pieces.append(_fold(blocks, bytes(HASH), per_piece))
    return FileHashes(size, root_of_pieces(pieces, piece_size), tuple(pieces), whole.digest())


def hash_piece(data: bytes, piece_size: int) -> bytes:
    """Hash of one piece (its `data`, shorter only at the end) of a file that has several."""
    blocks = [sha256(data[start : start + BLOCK]).digest() for start in range(0, len(data), BLOCK)]
    return _fold(blocks, bytes(HASH), piece_size // BLOCK)


def hash_bytes(data: bytes, piece_size: int) -> FileHashes:
    return hash_file(BytesIO(data), piece_size)
