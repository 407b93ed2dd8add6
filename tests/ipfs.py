"""Makes UnixFS out of bytes, block by block: what `ipfs add` does, written from the specifications.

Independent of what hostos reads it with, and able to make what no honest program would.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

DAG_PB, RAW = 0x70, 0x55
CHUNK = 64 * 1024


def number(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def integer(key: int, value: int) -> bytes:
    return number(key << 3) + number(value)


def text(key: int, value: bytes) -> bytes:
    return number(key << 3 | 2) + number(len(value)) + value


def binary(codec: int, digest: bytes, kind: int = 0x12) -> bytes:
    return b"\x01" + number(codec) + number(kind) + number(len(digest)) + digest


def base32(cid: bytes) -> str:
    return "b" + base64.b32encode(cid).decode().rstrip("=").lower()


def unixfs(
    kind: int, data: bytes = b"", sizes: Sequence[int] = (), extra: bytes = b"", size: int | None = None
) -> bytes:
    message = integer(1, kind) + (text(2, data) if data else b"")
    if kind in (0, 2):
        message += integer(3, len(data) + sum(sizes) if size is None else size)
    return message + b"".join(integer(4, each) for each in sizes) + extra


def attributes(mode: int | None = None, mtime: int | None = None) -> bytes:
    """UnixFS 1.5."""
    found = integer(7, mode) if mode is not None else b""
    if mtime is not None:
        found += text(8, integer(1, mtime & (1 << 64) - 1) + number(2 << 3 | 5) + (5).to_bytes(4, "little"))
    return found


def node(links: Sequence[tuple[bytes, bytes, int]], data: bytes) -> bytes:
    """`links`: binary CID, name, cumulative size."""
    parts = [text(2, text(1, cid) + text(2, name) + integer(3, size)) for cid, name, size in links]
    return b"".join(parts) + text(1, data)


@dataclass
class Store:
    """Blocks by binary CID. The methods return the binary CID and the cumulative size."""

    blocks: dict[bytes, bytes] = field(default_factory=dict)

    def put(self, codec: int, block: bytes) -> bytes:
        cid = binary(codec, hashlib.sha256(block).digest())
        self.blocks[cid] = block
        return cid

    def file(
        self, data: bytes, *, chunk: int = CHUNK, width: int = 174, raw: bool = True, extra: bytes = b""
    ) -> tuple[bytes, int]:
        """A balanced tree, as Kubo makes it."""
        level: list[tuple[bytes, int, int]] = []
        for start in range(0, max(len(data), 1), chunk):
            part = data[start : start + chunk]
            block = part if raw else node((), unixfs(2, part))
            level.append((self.put(RAW if raw else DAG_PB, block), len(part), len(block)))
        while len(level) > 1 or extra:
            above = []
            for start in range(0, len(level), width):
                group = level[start : start + width]
                top = extra if len(level) <= width else b""
                block = node(
                    [(cid, b"", total) for cid, _, total in group], unixfs(2, b"", [n for _, n, _ in group], top)
                )
                size = sum(n for _, n, _ in group)
                above.append((self.put(DAG_PB, block), size, len(block) + sum(total for _, _, total in group)))
            level = above
            if len(level) == 1:
                break
        cid, _, total = level[0]
        return cid, total

    def directory(self, entries: Mapping[str, tuple[bytes, int]], extra: bytes = b"") -> tuple[bytes, int]:
        links = [(cid, name.encode(), size) for name, (cid, size) in sorted(entries.items())]
        block = node(links, unixfs(1, extra=extra))
        return self.put(DAG_PB, block), len(block) + sum(size for _, _, size in links)

    def symlink(self, target: str, extra: bytes = b"") -> tuple[bytes, int]:
        block = node((), unixfs(4, target.encode(), extra=extra))
        return self.put(DAG_PB, block), len(block)

    def tree(self, path: Path, *, attributed: bool = True) -> tuple[bytes, int]:
        """A directory of this machine, with modes and times (`attributed`) or without."""
        entries = {}
        for child in sorted(path.iterdir()):
            status = child.lstat()
            extra = attributes(status.st_mode & 0o7777, int(status.st_mtime)) if attributed else b""
            if child.is_symlink():
                entries[child.name] = self.symlink(str(child.readlink()), extra)
            elif child.is_dir():
                entries[child.name] = self.tree(child, attributed=attributed)
            elif child.is_file():
                entries[child.name] = self.file(child.read_bytes(), extra=extra)
        status = path.lstat()
        extra = attributes(status.st_mode & 0o7777, int(status.st_mtime)) if attributed else b""
        return self.directory(entries, extra)

    def sharded(self, entries: Mapping[str, tuple[bytes, int]], fanout: int = 256) -> tuple[bytes, int]:
        """A HAMT of up to two levels, by the first byte of the names' hash: enough for a reader."""
        slots: dict[str, list[tuple[str, tuple[bytes, int]]]] = {}
        for name, entry in entries.items():
            slots.setdefault(f"{hashlib.md5(name.encode()).digest()[0]:02X}", []).append((name, entry))
        data = unixfs(5, b"\1", extra=integer(5, 0x22) + integer(6, fanout))
        links = []
        for slot, here in sorted(slots.items()):
            if len(here) == 1:
                name, (cid, size) = here[0]
                links.append((cid, f"{slot}{name}".encode(), size))
                continue
            below = [(cid, f"{index:02X}{name}".encode(), size) for index, (name, (cid, size)) in enumerate(here)]
            block = node(below, data)
            links.append((self.put(DAG_PB, block), slot.encode(), len(block)))
        block = node(links, data)
        return self.put(DAG_PB, block), len(block)
