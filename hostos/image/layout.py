"""Where in a squashfs file the contents of each path lie.

Format: https://www.kernel.org/doc/html/latest/filesystems/squashfs.html and
https://dr-emann.github.io/squashfs/. Read are files this host has packed itself (zstd, or not
compressed at all); data blocks are only located, never unpacked.
"""

from __future__ import annotations

import stat
import struct
import subprocess
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from hostos.errors import failure
from hostos.image.squashfs import ABSENT, SUPERBLOCK

METADATA = 8192
"""Bytes of a block of metadata before compression."""
_NO_FRAGMENT = 0xFFFFFFFF
_STORED = 1 << 24
"""Marks a data block that isn't compressed."""

_HEADER = struct.Struct("<HHHHII")
_ZSTD = b"\x28\xb5\x2f\xfd"

Span = tuple[int, int]
"""Offset and length in the squashfs file, bytes."""


@dataclass(frozen=True)
class Place:
    """Where something is. `metadata`: of its inode, and what finding it in its directory reads.

    `blocks`: contents in units of the block size (a hole has length 0); `tail`: the fragment block with
    the end of the file, or all of it, and the metadata that says where that is.
    """

    mode: int
    metadata: tuple[Span, ...]
    blocks: tuple[Span, ...] = ()
    tail: tuple[Span, ...] = ()

    def block(self, number: int) -> tuple[Span, ...]:
        """What must be read for block `number` of the contents; nothing if there is none."""
        if number < len(self.blocks):
            return (self.blocks[number],) if self.blocks[number][1] else ()
        return self.tail


@dataclass(frozen=True)
class Layout:
    """`paths`: every name (hard links have equal places), as in `Entry.path`; `root`: `b""`.

    `always`: what every mount reads: the superblock and the tables at the end.
    """

    block_size: int
    always: tuple[Span, ...]
    paths: dict[bytes, Place]
    _index: list[tuple[int, int, bytes, int]] = field(default_factory=list, repr=False)

    def find(self, offset: int, length: int) -> Iterator[tuple[bytes, int, Span]]:
        """Which blocks of which files a read of these bytes touches: path, number and place of the block.

        Of several names of a file the first is given. A fragment block is nobody's.
        """
        if not self._index:
            spans: dict[int, tuple[int, int, bytes, int]] = {}
            for path in sorted(self.paths, key=lambda path: path.split(b"/")):
                for number, (start, size) in enumerate(self.paths[path].blocks):
                    if size:
                        spans.setdefault(start, (start, start + size, path, number))
            self._index.extend(spans[start] for start in sorted(spans))
        place = max(0, bisect_right(self._index, (offset, 1 << 63, b"", 0)) - 1)
        while place < len(self._index) and self._index[place][0] < offset + length:
            start, end, path, number = self._index[place]
            if end > offset:
                yield path, number, (start, end - start)
            place += 1


def read_layout(path: Path) -> Layout:
    """The layout of the squashfs file in `path`. Raises UserError (status 1) if it can't be read."""
    with path.open("rb") as file:
        try:
            return _Reader(file).layout()
        except (struct.error, IndexError, ValueError, KeyError) as error:
            raise failure(f"{path}: its squashfs structures can't be read: {error!r}") from None


class _Table:
    """A run of metadata blocks, unpacked. Positions are relative to its beginning in the file."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self.start, self._spans = start, dict[int, tuple[int, int]]()
        frames, position = [], start
        while position + 2 <= end:
            file.seek(position)
            (header,) = struct.unpack("<H", file.read(2))
            size = header & 0x7FFF
            data = file.read(size)
            if not size or len(data) != size:
                break
            # Position in the table -> number of the block, bytes it takes.
            self._spans[position - start] = (len(self._spans), 2 + size)
            frames.append(_frame(data) if header & 0x8000 else data)
            position += 2 + size
        self.data = _unpack(b"".join(frames))

    def at(self, block: int, offset: int) -> int:
        """Where in `data` something is that is known as block (its position) and offset."""
        return self._spans[block][0] * METADATA + offset

    def span(self, block: int) -> Span:
        return (self.start + block, self._spans[block][1])

    def spans(self, block: int, offset: int, length: int) -> tuple[Span, ...]:
        """The blocks that hold `length` bytes from there on."""
        first = self._spans[block][0]
        last = first + (offset + max(length, 1) - 1) // METADATA
        order = self._order()
        return tuple(self.span(order[number]) for number in range(first, min(last, len(order) - 1) + 1))

    def _order(self) -> list[int]:
        if not hasattr(self, "_positions"):
            self._positions = list(self._spans)
        return self._positions


def _frame(data: bytes) -> bytes:
    """`data` as a zstd frame of one block that isn't compressed (RFC 8878 §3.1): all can be unpacked at once."""
    return _ZSTD + b"\x00\x18" + (1 | len(data) << 3).to_bytes(3, "little") + data


def _unpack(frames: bytes) -> bytes:
    """The zstd program takes any number of frames. A metadata block that is compressed is one."""
    if not frames:
        return b""
    try:
        done = subprocess.run(["zstd", "-dcq"], input=frames, capture_output=True, check=False)
    except FileNotFoundError:
        raise failure("zstd is needed to look into a layer", "sudo apt-get install zstd") from None
    if done.returncode:
        raise ValueError(done.stderr.decode(errors="replace").strip())
    return done.stdout


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        (
            _, _, _, self.block_size, self._fragments, _, _, _, _, _, _, self._root, self._used,
            self._ids, self._xattrs, inodes, directories, self._fragment_table, lookup,
        ) = SUPERBLOCK.unpack(file.read(SUPERBLOCK.size))  # fmt: skip
        ends = [self._used, self._pointer(self._ids)]
        ends += [self._pointer(self._fragment_table)] if self._fragments else []
        ends += [self._pointer(lookup)] if lookup != ABSENT else []
        ends += [self._pointer(self._xattrs)] if self._xattrs != ABSENT else []
        self._tables_end = min(end for end in ends if end > directories)
        self._inodes = _Table(file, inodes, directories)
        self._directories = _Table(file, directories, self._tables_end)
        self._places: dict[tuple[int, int], Place] = {}
        self._tails = self._read_fragments()

    def _pointer(self, at: int) -> int:
        """Tables are lists of pointers to metadata blocks, the first of which comes first in the file."""
        self._file.seek(at)
        return int(struct.unpack("<Q", self._file.read(8))[0])

    def _read_fragments(self) -> list[tuple[Span, Span]]:
        """For each fragment block: itself, and the metadata that names it."""
        if not self._fragments:
            return []
        count = -(-self._fragments * 16 // METADATA)
        self._file.seek(self._fragment_table)
        starts = struct.unpack(f"<{count}Q", self._file.read(8 * count))
        table = _Table(self._file, starts[0], self._fragment_table)
        found = []
        for number in range(self._fragments):
            start, size, _ = struct.unpack_from("<QII", table.data, 16 * number)
            found.append(((start, size & (_STORED - 1)), table.span(starts[16 * number // METADATA] - starts[0])))
        return found

    def layout(self) -> Layout:
        always = ((0, SUPERBLOCK.size), (self._tables_end, self._used - self._tables_end))
        paths: dict[bytes, Place] = {}
        waiting: list[tuple[bytes, int, int, tuple[Span, ...]]] = [(b"", self._root >> 16, self._root & 0xFFFF, ())]
        while waiting:
            path, block, offset, lookup = waiting.pop()
            place = self._inode(block, offset)
            paths[path] = Place(place.mode, (*lookup, *place.metadata), place.blocks, place.tail)
            if stat.S_ISDIR(place.mode):
                waiting.extend(self._children(path, block, offset))
        return Layout(self.block_size, always, paths)

    def _children(self, path: bytes, block: int, offset: int) -> Iterator[tuple[bytes, int, int, tuple[Span, ...]]]:
        data, at = self._inodes.data, self._inodes.at(block, offset)
        kind = data[at] | data[at + 1] << 8
        if kind == 1:
            start, _, size, inside = struct.unpack_from("<IIHH", data, at + 16)
        else:
            _, size, start, _, _, inside = struct.unpack_from("<IIIIHH", data, at + 16)
        if size <= 3:
            return
        spans = self._directories.spans(start, inside, size - 3)
        data, at = self._directories.data, self._directories.at(start, inside)
        end = at + size - 3
        while at < end:
            count, inode_block, _ = struct.unpack_from("<III", data, at)
            at += 12
            for _ in range(count + 1):
                inode_offset, _, _, length = struct.unpack_from("<HhHH", data, at)
                name = data[at + 8 : at + 9 + length]
                at += 9 + length
                yield (path + b"/" + name if path else name, inode_block, inode_offset, spans)

    def _inode(self, block: int, offset: int) -> Place:
        if (known := self._places.get((block, offset))) is not None:
            return known
        data, at = self._inodes.data, self._inodes.at(block, offset)
        kind, mode, *_ = _HEADER.unpack_from(data, at)
        mode |= (0, *_TYPES, *_TYPES)[kind]
        blocks: tuple[Span, ...] = ()
        tail: tuple[Span, ...] = ()
        length = 64
        if kind in (2, 9):
            if kind == 2:
                start, fragment, _, size = struct.unpack_from("<IIII", data, at + 16)
                head = 32
            else:
                start, size, _, _, fragment = struct.unpack_from("<QQQII", data, at + 16)
                head = 56
            count = size // self.block_size
            if fragment == _NO_FRAGMENT:
                count = -(-size // self.block_size)
            sizes = struct.unpack_from(f"<{count}I", data, at + head)
            blocks = tuple(_spans(start, sizes))
            length = head + 4 * count
            if fragment != _NO_FRAGMENT:
                tail = self._tails[fragment][::-1]
        place = Place(mode, self._inodes.spans(block, offset, length), blocks, tail)
        self._places[block, offset] = place
        return place


# Types of inodes in the order of their numbers; the same again for the extended ones.
_TYPES = (stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, stat.S_IFBLK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK)


def _spans(start: int, sizes: Iterable[int]) -> Iterator[Span]:
    for size in sizes:
        size &= _STORED - 1
        yield start, size
        start += size
