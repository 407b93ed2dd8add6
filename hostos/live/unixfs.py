"""UnixFS: files, directories and links made of IPFS blocks, read from their CID on.

https://specs.ipfs.tech/unixfs/. Blocks are proved by their CIDs; what they say is still a stranger's word:
sizes must add up, depth and numbers are limited. A cycle cannot be made with hashes, and depth would end it.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from hostos.live import dagpb
from hostos.live.cid import RAW, Cid
from hostos.live.dagpb import BlockError, Node, Unixfs

MAX_DEPTH = 16
"""Most levels of blocks in one file, or of shards in one directory (Kubo's files of 1 TiB need 5)."""
MAX_FILE = 1 << 42
MAX_ENTRIES = 200_000
"""Most entries of one directory."""
MAX_SHARDS = 1 << 16
MAX_TARGET = 4095
"""Longest target of a symbolic link, bytes."""
PARALLEL = 16
REMEMBER = 64 * 1024
"""Largest block whose meaning is remembered: those within files have 174 links, 10 kB."""

Fetch = Callable[[Cid], Awaitable[bytes]]
"""Gives a verified block."""


@dataclass(frozen=True)
class File:
    """A regular file, or a part of one: the bytes in `inline`, then those of `parts`."""

    size: int
    inline: bytes = b""
    parts: tuple[tuple[Cid, int], ...] = ()
    """Each with its size."""
    mode: int | None = None
    mtime: tuple[int, int] | None = None


@dataclass(frozen=True)
class Directory:
    """Its entries are read with `entries`."""

    node: Node
    sharded: bool
    fanout: int = 0
    mode: int | None = None
    mtime: tuple[int, int] | None = None


@dataclass(frozen=True)
class Symlink:
    target: bytes
    mode: int | None = None
    mtime: tuple[int, int] | None = None


def decode(cid: Cid, block: bytes) -> File | Directory | Symlink:
    """What a block is the beginning of. Raises BlockError."""
    if cid.codec == RAW:
        return File(len(block), block)
    return _remembered(block) if len(block) <= REMEMBER else _decode(block)


@functools.lru_cache(maxsize=64)
def _remembered(block: bytes) -> File | Directory | Symlink:
    return _decode(block)


def _decode(block: bytes) -> File | Directory | Symlink:
    node = dagpb.decode_node(block)
    if node.data is None:
        raise BlockError("a dag-pb block without data: not UnixFS")
    data = dagpb.decode_unixfs(node.data)
    if data.type in (dagpb.FILE, dagpb.RAW):
        return _file(node, data)
    if data.type == dagpb.DIRECTORY:
        return Directory(node, False, 0, data.mode, data.mtime)
    if data.type == dagpb.HAMT:
        fanout = data.fanout or 0
        if not 8 <= fanout <= 1024 or fanout & (fanout - 1):
            raise BlockError(f"a directory in shards of {fanout}")
        return Directory(node, True, fanout, data.mode, data.mtime)
    if data.type == dagpb.SYMLINK:
        if node.links or not 0 < len(data.data) <= MAX_TARGET or b"\0" in data.data:
            raise BlockError("a symbolic link that leads nowhere")
        return Symlink(data.data, data.mode, data.mtime)
    raise BlockError("UnixFS metadata blocks are not files")


def _file(node: Node, data: Unixfs) -> File:
    if len(node.links) != len(data.block_sizes):
        raise BlockError("a file whose parts have no sizes")
    total = len(data.data) + sum(data.block_sizes)
    if total > MAX_FILE or (data.size is not None and data.size != total):
        raise BlockError("a file whose sizes don't add up")
    parts = tuple((link.cid, size) for link, size in zip(node.links, data.block_sizes, strict=True) if size)
    return File(total, data.data, parts, data.mode, data.mtime)


@dataclass(frozen=True)
class Leaf:
    """Where bytes of a file are: `skip` bytes into the content of a block, `size` of them."""

    cid: Cid
    expected: int
    """Bytes its parent says it holds."""
    skip: int
    size: int


async def leaves(root: File, start: int, end: int, fetch: Fetch) -> list[bytes | Leaf]:
    """What makes up the bytes `start` to `end` (within the file), in order; the blocks on the way to
    them are fetched. Raises BlockError, and what `fetch` raises."""
    found: list[bytes | Leaf] = []
    await _descend(root, start, end, fetch, found, 0)
    return found


async def _descend(file: File, start: int, end: int, fetch: Fetch, found: list[bytes | Leaf], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise BlockError(f"a file of more than {MAX_DEPTH} levels")
    if start < len(file.inline):
        found.append(file.inline[start:end])
    at = len(file.inline)
    for cid, size in file.parts:
        if at + size <= start:
            at += size
            continue
        low, high = max(start, at), min(end, at + size)
        if low < high:
            if cid.codec == RAW:
                found.append(Leaf(cid, size, low - at, high - low))
            else:
                await _descend(await part(cid, size, fetch), low - at, high - at, fetch, found, depth + 1)
        at += size
        if at >= end:
            break


async def part(cid: Cid, size: int, fetch: Fetch) -> File:
    """The part of a file below a link, which must be as large as the link's parent said."""
    below = decode(cid, await fetch(cid))
    if not isinstance(below, File) or below.size != size:
        raise BlockError("a part of a file is not what the file says")
    return below


def cut(leaf: Leaf, block: bytes) -> bytes:
    """The bytes of a leaf from its block. Raises BlockError."""
    if len(block) != leaf.expected:
        raise BlockError("a part of a file is not as large as the file says")
    return block[leaf.skip : leaf.skip + leaf.size]


async def read(root: File, start: int, end: int, fetch: Fetch) -> bytes:
    """The bytes `start` to `end` of a file, all blocks of them at once. Raises BlockError."""
    end = min(end, root.size)
    if start >= end:
        return b""
    pieces = await leaves(root, start, end, fetch)
    wanted = [piece for piece in pieces if isinstance(piece, Leaf)]
    blocks: dict[Cid, bytes] = {}
    if len(wanted) == 1:
        blocks[wanted[0].cid] = await fetch(wanted[0].cid)
    elif wanted:
        await in_parallel(tuple(dict.fromkeys(leaf.cid for leaf in wanted)), fetch, blocks)
    return b"".join(cut(piece, blocks[piece.cid]) if isinstance(piece, Leaf) else piece for piece in pieces)


async def in_parallel(cids: tuple[Cid, ...], fetch: Fetch, into: dict[Cid, bytes]) -> None:
    """Fetch blocks at once, `PARALLEL` at a time; raises the first error that `fetch` raises."""
    limit = trio.CapacityLimiter(PARALLEL)
    errors: list[Exception] = []

    async def one(cid: Cid) -> None:
        async with limit:
            try:
                into[cid] = await fetch(cid)
            except (OSError, ValueError) as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for cid in cids:
            nursery.start_soon(one, cid)
    if errors:
        raise errors[0]


async def entries(directory: Directory, fetch: Fetch) -> dict[bytes, dagpb.Link]:
    """The entries of a directory by name; shards are fetched. Raises BlockError.

    Names that no file system could have (`..`, with slashes, given twice) are refused.
    """
    found: dict[bytes, dagpb.Link] = {}
    if directory.sharded:
        await _shards(directory, fetch, found)
    else:
        for link in directory.node.links:
            _entry(found, link.name, link)
    return found


async def _shards(top: Directory, fetch: Fetch, found: dict[bytes, dagpb.Link]) -> None:
    """A HAMT: names begin with the slot in hex; a name that is nothing else leads to another shard."""
    width = len(f"{top.fanout - 1:X}")
    level, count = [top], 0
    for _ in range(MAX_DEPTH):
        below: list[Cid] = []
        for shard in level:
            for link in shard.node.links:
                if len(link.name) < width:
                    raise BlockError("a shard of a directory without slots")
                if len(link.name) == width:
                    below.append(link.cid)
                else:
                    _entry(found, link.name[width:], link)
        count += len(below)
        if count > MAX_SHARDS:
            raise BlockError(f"a directory of more than {MAX_SHARDS} shards")
        if not below:
            return
        blocks: dict[Cid, bytes] = {}
        await in_parallel(tuple(dict.fromkeys(below)), fetch, blocks)
        level = []
        for cid in below:
            inner = decode(cid, blocks[cid])
            if not isinstance(inner, Directory) or not inner.sharded or inner.fanout != top.fanout:
                raise BlockError("a shard of a directory is none")
            level.append(inner)
    raise BlockError(f"a directory of more than {MAX_DEPTH} levels of shards")


def _entry(found: dict[bytes, dagpb.Link], name: bytes, link: dagpb.Link) -> None:
    if not 0 < len(name) <= dagpb.MAX_NAME or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise BlockError(f"a directory with the entry {name[:40]!r}")
    if name in found:
        raise BlockError(f"a directory with the entry {name[:40]!r} twice")
    if len(found) >= MAX_ENTRIES:
        raise BlockError(f"a directory of more than {MAX_ENTRIES} entries")
    found[name] = link
