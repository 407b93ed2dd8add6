"""The boot trace of an image: which blocks its workloads read first, in order (`trace.json`).

It is part of the image, so its hash proves it, but an image comes from strangers: like the manifest
it is parsed strictly, with limits. The worst a malicious trace can do is to have blocks of the
image fetched that nobody reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hostos.errors import UserError
from hostos.live.merkle import BLOCK

SCHEMA = 1
KIND = "hostos-trace"

MAX_TRACE = 1024 * 1024
"""Largest `trace.json`, bytes."""
MAX_WORKLOADS = 16
MAX_RANGES = 65536
"""Most ranges of one workload."""
MAX_COMMAND = 64 * 1024
"""Longest command of a workload, bytes."""


def _bad(why: str) -> UserError:
    return UserError(f"boot trace: {why}", "the image is damaged or was made by another program")


@dataclass(frozen=True)
class Range:
    """`count` blocks of 16 KiB from `first` on, in layer number `layer` (0 is the lowest)."""

    layer: int
    first: int
    count: int


@dataclass(frozen=True)
class Workload:
    """What was run, and what it read. `command`: argv; empty: the image's init."""

    command: tuple[str, ...]
    ranges: tuple[Range, ...]

    @property
    def size(self) -> int:
        """Bytes of its blocks."""
        return sum(item.count for item in self.ranges) * BLOCK


@dataclass(frozen=True)
class Trace:
    """`workloads`: the most important first."""

    workloads: tuple[Workload, ...]

    def to_json(self) -> bytes:
        """The one spelling of this trace. Raises UserError when it is larger than `MAX_TRACE`."""
        workloads = [
            {
                "command": list(workload.command),
                "blocks": [[item.layer, item.first, item.count] for item in workload.ranges],
            }
            for workload in self.workloads
        ]
        data = {"schema": SCHEMA, "kind": KIND, "workloads": workloads}
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        if len(text) > MAX_TRACE:
            raise UserError(f"the boot trace needs {len(text)} bytes of at most {MAX_TRACE}", "trace less at once")
        return text

    @classmethod
    def parse(cls, data: bytes, sizes: Sequence[int]) -> Trace:
        """The trace in `data`; `sizes`: bytes of the image's layers, lowest first. Raises UserError."""
        if len(data) > MAX_TRACE:
            raise _bad(f"{len(data)} bytes, more than {MAX_TRACE}")
        try:
            value = json.loads(data.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError):
            raise _bad("not JSON") from None
        if not isinstance(value, dict) or value.keys() != {"schema", "kind", "workloads"}:
            raise _bad("it is not an object of schema, kind and workloads")
        if type(value["schema"]) is not int or value["schema"] != SCHEMA:
            raise UserError(f"the boot trace has schema {str(value['schema'])[:20]}, this hostos knows {SCHEMA}")
        if value["kind"] != KIND:
            raise _bad(f"its kind is not {KIND}")
        workloads = value["workloads"]
        if not isinstance(workloads, list) or not 1 <= len(workloads) <= MAX_WORKLOADS:
            raise _bad(f"it has not 1 to {MAX_WORKLOADS} workloads")
        return cls(tuple(_workload(item, sizes) for item in workloads))

    def plan(self, command: Sequence[str]) -> tuple[Range, ...]:
        """What to fetch ahead when `command` (empty: the init) is about to run.

        The workload with this very command; else one with the same program; else what every
        workload reads, if there are several (loader, libc …). Possibly nothing.
        """
        for workload in self.workloads:
            if workload.command == tuple(command):
                return workload.ranges
        for workload in self.workloads:
            if command and workload.command and _program(workload.command) == _program(command):
                return workload.ranges
        first, *others = self.workloads
        if not others:
            return ()
        common = set.intersection(*(set(blocks(workload.ranges)) for workload in others))
        return tuple(Range(layer, block, 1) for layer, block in blocks(first.ranges) if (layer, block) in common)


def blocks(ranges: Iterable[Range]) -> Iterable[tuple[int, int]]:
    """Layer and number of each block."""
    return ((item.layer, block) for item in ranges for block in range(item.first, item.first + item.count))


def pieces(ranges: Iterable[Range], layer: int, piece_size: int) -> list[int]:
    """The pieces of `layer` that hold the blocks of `ranges`, each once, in order of first use."""
    found: dict[int, None] = {}
    for item in ranges:
        if item.layer == layer:
            last = (item.first + item.count) * BLOCK - 1
            found |= dict.fromkeys(range(item.first * BLOCK // piece_size, last // piece_size + 1))
    return list(found)


def _program(command: Sequence[str]) -> str:
    return command[0].rpartition("/")[2]


def _workload(value: Any, sizes: Sequence[int]) -> Workload:
    if not isinstance(value, dict) or value.keys() != {"command", "blocks"}:
        raise _bad("a workload is not an object of command and blocks")
    command, ranges = value["command"], value["blocks"]
    if not isinstance(command, list) or not all(isinstance(word, str) and "\0" not in word for word in command):
        raise _bad("a command is not a list of strings")
    try:
        if sum(len(word.encode()) + 1 for word in command) > MAX_COMMAND:
            raise _bad(f"a command is longer than {MAX_COMMAND} bytes")
    except UnicodeEncodeError:
        raise _bad("a command is not UTF-8") from None
    if not isinstance(ranges, list) or len(ranges) > MAX_RANGES:
        raise _bad(f"a workload's blocks are not a list of at most {MAX_RANGES} ranges")
    return Workload(tuple(command), tuple(_range(item, sizes) for item in ranges))


def _range(value: Any, sizes: Sequence[int]) -> Range:
    if not isinstance(value, list) or len(value) != 3 or any(type(number) is not int for number in value):
        raise _bad("a range is not three numbers")
    layer, first, count = value
    if not 0 <= layer < len(sizes):
        raise _bad(f"layer {layer} does not exist")
    if first < 0 or count < 1 or first + count > -(-sizes[layer] // BLOCK):
        raise _bad(f"blocks {first} + {count} are outside layer {layer}")
    return Range(layer, first, count)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result
