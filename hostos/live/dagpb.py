"""The two protobuf messages UnixFS consists of: dag-pb nodes, and the UnixFS data within them.

https://ipld.io/specs/codecs/dag-pb/spec/ and https://specs.ipfs.tech/unixfs/. The bytes are those their
CID names, but who made them is a stranger: every length and count has a limit, anything else is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from hostos.live.cid import Cid, from_bytes, read_varint

MAX_BLOCK = 2 * 1024 * 1024
"""Largest block, bytes: what Bitswap and gateways allow."""
MAX_LINKS = 1 << 15
MAX_NAME = 255

RAW, DIRECTORY, FILE, METADATA, SYMLINK, HAMT = range(6)
"""UnixFS `DataType`."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class BlockError(ValueError):
    """The block is what its CID says, and makes no sense."""


@dataclass(frozen=True)
class Link:
    """`size`: of everything below, blocks included, as whoever made it says (`Tsize`)."""

    cid: Cid
    name: bytes
    size: int


@dataclass(frozen=True)
class Node:
    """A dag-pb block."""

    links: tuple[Link, ...]
    data: bytes | None


@dataclass(frozen=True)
class Unixfs:
    """What a dag-pb node is in UnixFS. `block_sizes`: bytes of the file below each link; `mode`: twelve
    permission bits, `mtime`: seconds and nanoseconds, where the tree has them (UnixFS 1.5)."""

    type: int
    data: bytes = b""
    size: int | None = None
    block_sizes: tuple[int, ...] = ()
    fanout: int | None = None
    mode: int | None = None
    mtime: tuple[int, int] | None = None


def decode_node(block: bytes) -> Node:
    """The node in a dag-pb block. Raises BlockError."""
    if len(block) > MAX_BLOCK:
        raise BlockError(f"a block of {len(block)} bytes; {MAX_BLOCK} are allowed")
    links: list[Link] = []
    data: bytes | None = None
    try:
        for field, value in _fields(block):
            if field == 2 and isinstance(value, bytes):
                if len(links) >= MAX_LINKS:
                    raise BlockError(f"more than {MAX_LINKS} links in one block")
                links.append(_link(value))
            elif field == 1 and isinstance(value, bytes) and data is None:
                data = value
            else:
                raise BlockError(f"not dag-pb: field {field}")
    except ValueError as error:
        raise BlockError(str(error)) from None
    return Node(tuple(links), data)


def _link(message: bytes) -> Link:
    cid: Cid | None = None
    name, size = b"", 0
    seen = set()
    for field, value in _fields(message):
        if field in seen:
            raise BlockError("a link says something twice")
        seen.add(field)
        if field == 1 and isinstance(value, bytes):
            cid = from_bytes(value)
        elif field == 2 and isinstance(value, bytes):
            name = value
        elif field == 3 and isinstance(value, int):
            size = value
        else:
            raise BlockError(f"not a dag-pb link: field {field}")
    if cid is None:
        raise BlockError("a link to nothing")
    return Link(cid, name, size)


def decode_unixfs(data: bytes) -> Unixfs:
    """The UnixFS message in a node's data. Raises BlockError."""
    one: dict[int, int | bytes] = {}
    sizes: list[int] = []
    try:
        for field, value in _fields(data):
            if field == 4:
                # Packed or not: protobuf readers accept both.
                sizes += _packed(value) if isinstance(value, bytes) else [value]
                if len(sizes) > MAX_LINKS:
                    raise BlockError(f"more than {MAX_LINKS} parts in one block")
            elif field in one:
                raise BlockError("not UnixFS: something is said twice")
            elif field <= 8:  # later versions may add fields
                one[field] = value
        kind = one.get(1)
        content = one.get(2, b"")
        if not isinstance(kind, int) or kind > HAMT or not isinstance(content, bytes):
            raise BlockError("not UnixFS")
        mode = _number(one.get(7))
        return Unixfs(
            kind,
            content,
            _number(one.get(3)),
            tuple(sizes),
            _number(one.get(6)),
            mode & 0o7777 if mode is not None else None,
            _mtime(one.get(8)),
        )
    except ValueError as error:
        raise BlockError(str(error)) from None


def _number(value: int | bytes | None) -> int | None:
    if isinstance(value, bytes):
        raise BlockError("not UnixFS: a number is none")
    return value


def _mtime(value: int | bytes | None) -> tuple[int, int] | None:
    """A UnixTime: int64 seconds, fixed32 nanoseconds."""
    if value is None:
        return None
    if not isinstance(value, bytes):
        raise BlockError("not UnixFS: a time is none")
    parts = dict(_fields(value))
    seconds, nanoseconds = parts.get(1, 0), parts.get(2, 0)
    if not isinstance(seconds, int) or not isinstance(nanoseconds, int) or nanoseconds >= 10**9:
        raise BlockError("not UnixFS: a time is none")
    return (seconds - (1 << 64) if seconds >= 1 << 63 else seconds), nanoseconds


def _packed(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = read_varint(data, at)
        yield value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protobuf message. Raises ValueError."""
    at = 0
    while at < len(data):
        key, at = read_varint(data, at)
        field, wire = key >> 3, key & 7
        value: int | bytes
        if not field:
            raise BlockError("not protobuf: field 0")
        if wire == _VARINT:
            value, at = read_varint(data, at)
        elif wire == _BYTES:
            length, at = read_varint(data, at)
            if length > len(data) - at:
                raise BlockError("not protobuf: cut off")
            value, at = data[at : at + length], at + length
        elif wire in (_FIXED64, _FIXED32):
            form = "<Q" if wire == _FIXED64 else "<I"
            if struct.calcsize(form) > len(data) - at:
                raise BlockError("not protobuf: cut off")
            (value,) = struct.unpack_from(form, data, at)
            at += struct.calcsize(form)
        else:
            raise BlockError(f"not protobuf: wire type {wire}")
        yield field, value
