"""What a boot read, in terms of the tree: the input by which a traced image can be made again.

A recording names paths and blocks of files, not places in some squashfs file. So it outlives changes
of the tree, and the same tree with the same recording gives the same image (docs/images.md).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostos.errors import UserError
from hostos.image.layout import Layout, Span
from hostos.live import trace
from hostos.live.journal import SECTOR
from hostos.live.merkle import BLOCK

SCHEMA = 1
KIND = "hostos-recording"
MAX_RECORDING = 32 * 1024 * 1024

Lower = tuple[int, int, int]
"""A read of a layer below the top: its number, offset and length, bytes."""


@dataclass(frozen=True)
class Touch:
    """`blocks` of the contents (in units of 128 KiB) of the file `path`, in the order they were read in."""

    path: bytes
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Recorded:
    """One workload. `touches`: what was read for the first time, in order."""

    command: tuple[str, ...]
    touches: tuple[Touch | Lower, ...]


@dataclass(frozen=True)
class Recording:
    workloads: tuple[Recorded, ...]

    def order(self) -> dict[bytes, int]:
        """Paths of the top layer in the order of first use, the first workload's first."""
        found: dict[bytes, int] = {}
        for workload in self.workloads:
            for touch in workload.touches:
                if isinstance(touch, Touch):
                    found.setdefault(touch.path, len(found))
        return found

    def to_json(self) -> bytes:
        """Readable and editable: one line per touch."""
        workloads = [
            json.dumps(list(workload.command))
            + ',\n   "touched": [\n    '
            + ",\n    ".join(json.dumps(_written(touch)) for touch in workload.touches)
            + "\n   ]"
            for workload in self.workloads
        ]
        listed = ",\n  ".join(f'{{"command": {text}}}' for text in workloads)
        return f'{{"schema": {SCHEMA}, "kind": "{KIND}", "workloads": [\n  {listed}\n]}}\n'.encode()

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Raises UserError if the file isn't a recording."""
        try:
            if path.stat().st_size > MAX_RECORDING:
                raise _bad(path, f"more than {MAX_RECORDING} bytes")
            value = json.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise _bad(path, "not JSON") from None
        if not isinstance(value, dict) or value.get("kind") != KIND or not isinstance(value.get("workloads"), list):
            raise _bad(path, "made by something else")
        if value.get("schema") != SCHEMA:
            raise UserError(f"{path}: schema {str(value.get('schema'))[:20]}, this hostos knows {SCHEMA}")
        if not 1 <= len(value["workloads"]) <= trace.MAX_WORKLOADS:
            raise _bad(path, f"it has not 1 to {trace.MAX_WORKLOADS} workloads")
        return cls(tuple(_workload(path, item) for item in value["workloads"]))


def _bad(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not a recording of a boot: {why}", "make one: hostos image trace … --save FILE")


def _written(touch: Touch | Lower) -> list[Any]:
    if isinstance(touch, Touch):
        return [os.fsdecode(touch.path), list(touch.blocks)]
    return list(touch)


def _workload(path: Path, value: Any) -> Recorded:
    if not isinstance(value, dict) or not isinstance(value.get("touched"), list):
        raise _bad(path, "a workload has no list of what it touched")
    command = value.get("command")
    if not isinstance(command, list) or not all(isinstance(word, str) and "\0" not in word for word in command):
        raise _bad(path, "a workload's command is not a list of strings")
    return Recorded(tuple(command), tuple(_touch(path, item) for item in value["touched"]))


def _touch(path: Path, value: Any) -> Touch | Lower:
    match value:
        case [str(name), list(blocks)] if all(type(number) is int and 0 <= number < 1 << 32 for number in blocks):
            return Touch(os.fsencode(name), tuple(blocks))
        case [int(layer), int(offset), int(length)] if min(layer, offset) >= 0 < length:
            return layer, offset, length
    raise _bad(path, f"{str(value)[:60]} is neither a path with blocks nor a range of a layer")


def from_reads(command: Sequence[str], reads: Iterable[Lower], twin: Layout, top: int) -> Recorded:
    """What the reads of a boot (layer, offset, length) were about.

    `twin`: layout of the top layer (number `top`) as it was read: every block belongs to one file. The
    kernel reads blocks whole, but in sectors, or in pages: one that was read in part is the neighbour of one that was
    meant.
    """
    touches: list[Touch | Lower] = []
    missing: dict[tuple[bytes, int], set[int]] = {}
    for layer, offset, length in reads:
        if layer != top:
            touches.append((layer, offset, length))
            continue
        sectors = range(offset // SECTOR, -(-(offset + length) // SECTOR))
        for path, block, (start, size) in twin.find(offset, length):
            left = missing.setdefault((path, block), set(range(start // SECTOR, (start + size - 1) // SECTOR + 1)))
            if not left:
                continue
            left.difference_update(sectors)
            if left:
                continue
            last = touches[-1] if touches else None
            if isinstance(last, Touch) and last.path == path:
                touches[-1] = Touch(path, (*last.blocks, block))
            else:
                touches.append(Touch(path, (block,)))
    return Recorded(tuple(command), tuple(touches))


def to_trace(recording: Recording, layout: Layout, sizes: Sequence[int]) -> bytes:
    """`trace.json` of the image whose layers have these `sizes` and whose top one has this `layout`.

    What the tree doesn't have (any more) is left out. Raises UserError if it gets too large.
    """
    top = len(sizes) - 1
    workloads = []
    for workload in recording.workloads:
        spans = list(_spans(workload, layout, top))
        reads = [item for item in spans if item[1] + item[2] <= sizes[item[0]]]
        workloads.append(trace.Workload(workload.command, tuple(_ranges(reads))))
    return trace.Trace(tuple(workloads)).to_json()


def _spans(workload: Recorded, layout: Layout, top: int) -> Iterable[Lower]:
    def here(spans: Iterable[Span]) -> Iterable[Lower]:
        return ((top, offset, length) for offset, length in spans)

    yield from here(layout.always)
    for touch in workload.touches:
        if not isinstance(touch, Touch):
            if touch[0] < top:
                yield touch
            continue
        place = layout.paths.get(touch.path)
        if place is None:
            continue
        yield from here(_lookup(touch.path, layout.paths))
        for block in touch.blocks:
            yield from here(place.block(block))


def _lookup(path: bytes, paths: Mapping[bytes, Any]) -> Iterable[Span]:
    """The metadata that is read on the way to `path`, from the root on."""
    parts = path.split(b"/")
    for depth in range(len(parts) + 1):
        if (place := paths.get(b"/".join(parts[:depth]))) is not None:
            yield from place.metadata


def _ranges(reads: Iterable[Lower]) -> Iterable[trace.Range]:
    """The blocks of the reads, each once, neighbours together."""
    seen: set[tuple[int, int]] = set()
    layer = first = count = 0
    for number, offset, length in reads:
        for block in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
            if (number, block) in seen:
                continue
            seen.add((number, block))
            if count and number == layer and block == first + count:
                count += 1
                continue
            if count:
                yield trace.Range(layer, first, count)
            layer, first, count = number, block, 1
    if count:
        yield trace.Range(layer, first, count)
