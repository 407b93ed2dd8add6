"""The pieces of a torrent that are on this machine: proved before they count, kept where they can be read.

What libtorrent says is not enough (docs/live-boot.md): a finished piece is not yet in the file, and
after a failed write it never gets there. Nothing here knows of peers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import libtorrent

from hostos.live.merkle import HASH, hash_bytes, hash_piece
from hostos.live.source import SourceError


class PieceHashes:
    """From the bytes of a layer's torrent, which must have been verified (`parse_layer_torrent`)."""

    def __init__(self, torrent: bytes) -> None:
        decoded: Any = libtorrent.bdecode(torrent)
        info = decoded[b"info"]
        (entry,) = info[b"file tree"].values()
        self.piece_size: int = info[b"piece length"]
        self._root: bytes = entry[b""][b"pieces root"]
        self._pieces: bytes = decoded[b"piece layers"].get(self._root, b"")

    def proves(self, piece: int, data: bytes) -> bool:
        """Whether `data` is this piece of the layer. (Nothing is no piece: a file that was cut gives that.)"""
        if not data:
            return False
        if not self._pieces:
            return piece == 0 and hash_bytes(data, self.piece_size).root == self._root
        wanted = self._pieces[piece * HASH : (piece + 1) * HASH]
        return 0 < len(data) <= self.piece_size and hash_piece(data, self.piece_size) == wanted


class PieceStore:
    """Which pieces are here, and their bytes. A piece goes through these states, and may skip some:

    * claimed: said to be in the file, by an earlier run or by libtorrent; proved when first read
    * verified: libtorrent has it, perhaps only in its own memory
    * held: its bytes are in our memory
    * on disk: compared with the file, or hashed from it

    Held pieces and those on disk are `ready` to be read.

    `path`: libtorrent's file, read once pieces are in it; `keep`: never read it, hold everything.
    `hashes`: without them claims can't be proved and don't count. `lost`: called when a piece that
    libtorrent believes to have is not there, so it must be made to fetch it again.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        piece_size: int,
        pieces: int,
        *,
        keep: bool = False,
        hashes: PieceHashes | None = None,
        lost: Callable[[], None],
    ) -> None:
        self._path, self._size, self._piece_size, self._pieces = path, size, piece_size, pieces
        self._keep, self._hashes, self._tell_lost = keep, hashes, lost
        self._claimed: set[int] = set()
        self._unknown: set[int] = set()
        """Those of the claimed that libtorrent does not know to be there."""
        self._verified = bytearray(pieces)
        self._held: dict[int, bytes] = {}
        self._on_disk = bytearray(pieces)
        self._unflushed: set[int] = set()
        self._flushing: frozenset[int] = frozenset()
        self._last_flush = 0.0
        self._file = self._note_file = -1
        self._closed = False

    def open(self) -> None:
        """Claim what an earlier run noted to be in the file."""
        if not self._keep and self._path.exists():
            self._claimed = self._read_note()
            self._unknown = set(self._claimed)

    def close(self) -> None:
        """From now on only what is held can be read."""
        self._closed = True
        for descriptor in (self._file, self._note_file):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._note_file = -1

    # --- asking -----------------------------------------------------------------------------------

    def ready(self, piece: int) -> bool:
        return bool(self._on_disk[piece]) or piece in self._held

    def verified(self, piece: int) -> bool:
        return bool(self._verified[piece])

    def expected(self, piece: int) -> bool:
        """Whether it is verified or claimed: nobody needs to be asked for it yet."""
        return bool(self._verified[piece]) or piece in self._claimed

    def on_disk(self) -> list[bool]:
        """For each piece: what libtorrent may be told it has."""
        return [bool(there) for there in self._on_disk]

    def verified_bytes(self) -> int:
        total = sum(self._verified) * self._piece_size
        if self._verified[-1]:
            total -= self._pieces * self._piece_size - self._size
        return total

    def get(self, piece: int, low: int, high: int) -> bytes | None:
        """Bytes from `low` to `high` of the content, which are in this piece; None if it is not ready.

        Raises `SourceError` if the file was cut; the piece is then forgotten, and can be fetched again.
        """
        if (held := self._held.get(piece)) is not None:
            start = piece * self._piece_size
            return held[low - start : high - start]
        if self._closed or not self._on_disk[piece]:
            return None
        data = self._pread(low, high - low)
        if len(data) != high - low:
            self._on_disk[piece] = self._verified[piece] = 0
            raise SourceError(f"{self._path} is shorter than it was")
        return data

    # --- what libtorrent says ---------------------------------------------------------------------

    def finished(self, piece: int) -> None:
        """All of it came and had the right hash."""
        self._verified[piece] = 1
        self._unflushed.add(piece)

    def take(self, piece: int, data: bytes) -> None:
        """Hold a piece that was proved and did not come through libtorrent, which is given it, too."""
        self._verified[piece] = 1
        self._held[piece] = data

    def held(self, piece: int) -> bytes | None:
        """The bytes of a piece that is in memory."""
        return self._held.get(piece)

    def unreadable(self, piece: int) -> None:
        """libtorrent could not read it back."""
        self._verified[piece] = 0

    def delivered(self, piece: int, data: Any) -> bool:
        """Hold the bytes (a buffer) that libtorrent read back; False if they are not the piece."""
        if self._keep or not self._on_disk[piece]:
            # libtorrent 2.0 pads the last piece.
            content = bytes(data)[: self._size - piece * self._piece_size]
            if self._hashes is not None and not self._hashes.proves(piece, content):
                # The block was right when it came and could not be written: libtorrent reads back zeros.
                self._lost(piece)
                return False
            self._held[piece] = content
            self._unflushed.add(piece)
        return True

    def forget_unwritten(self) -> None:
        """libtorrent has dropped the torrent: what was not confirmed to be on disk is fetched again."""
        self._verified[:] = self._on_disk
        self._unknown |= self._claimed
        self._unflushed.clear()
        self._flushing = frozenset()

    def _lost(self, piece: int) -> None:
        self._verified[piece] = 0
        self._tell_lost()

    # --- getting it onto the disk -----------------------------------------------------------------

    @property
    def unflushed(self) -> bool:
        """Whether there are pieces that no flush was asked for yet."""
        return bool(self._unflushed)

    @property
    def flushing(self) -> bool:
        """Whether a flush is under way."""
        return bool(self._flushing)

    def since_flush(self) -> float:
        """Seconds since a flush last began."""
        return time.monotonic() - self._last_flush

    def begin_flush(self) -> None:
        """The caller asks libtorrent to write; its confirmation covers the pieces unflushed by now."""
        self._flushing = frozenset(self._unflushed)
        self._unflushed.clear()
        self._last_flush = time.monotonic()

    def confirm_flush(self) -> list[int]:
        """libtorrent says that it has written. Returns the pieces whose memory was given up."""
        released = []
        if not self._keep:
            for piece in self._flushing:
                if self._verified[piece] and self._written(piece):
                    released.append(piece)
            self._write_note()
        self._flushing = frozenset()
        return released

    def _written(self, piece: int) -> bool:
        """Compare a piece with the file (after a failed write libtorrent confirms, too); if it was held."""
        data = self._held.pop(piece, None)
        if data is None:
            self._claimed.add(piece)
            return False
        with suppress(OSError):
            if self._pread(piece * self._piece_size, len(data)) == data:
                self._on_disk[piece] = 1
        if not self._on_disk[piece]:
            self._lost(piece)
        return True

    # --- claims -----------------------------------------------------------------------------------

    def next_claim(self) -> int | None:
        """A piece that is said to be in the file, was not proved yet, and is not known to libtorrent."""
        return next(iter(self._unknown), None)

    def prove(self, piece: int) -> bool:
        """Hash a claimed piece; only if it is right it counts. Whether it now is here and libtorrent doesn't know."""
        if piece not in self._claimed:
            return False
        self._claimed.discard(piece)
        news = piece in self._unknown
        self._unknown.discard(piece)
        if self._on_disk[piece] or self._hashes is None:
            return False
        start = piece * self._piece_size
        with suppress(OSError):
            data = self._pread(start, min(self._piece_size, self._size - start))
            if self._hashes.proves(piece, data):
                self._verified[piece] = self._on_disk[piece] = 1
                return news
        if self._verified[piece]:
            self._lost(piece)
        return False

    @property
    def _note(self) -> Path:
        """Beside the file: for each piece a byte, 1 if it is in the file."""
        return self._path.parent / "pieces"

    def _read_note(self) -> set[int]:
        with suppress(OSError):
            noted = self._note.read_bytes()
            if len(noted) == self._pieces:
                return {piece for piece, there in enumerate(noted) if there == 1}
        return set()

    def _write_note(self) -> None:
        if self._closed:
            return
        noted = bytearray(self._on_disk)
        for piece in self._claimed:
            noted[piece] = 1
        with suppress(OSError):
            if self._note_file < 0:
                self._note_file = os.open(self._note, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(self._note_file, noted, 0)

    def _pread(self, offset: int, length: int) -> bytes:
        if self._file < 0:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._file, length, offset)
