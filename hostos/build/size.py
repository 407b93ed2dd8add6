"""What takes the space in a build."""

from __future__ import annotations

import collections
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostos.errors import UserError

_HEADER = 110


def report(os_directory: Path, most: int) -> str:
    """A table of the files of `dist/<target>` and, of the initrd, the directories and the largest
    files. The compressed size of a file is that of its own content: together they come to a little
    more than the archive. Raises `UserError` when there is no build."""
    manifest, files = _read(os_directory)
    lines = [f"{entry['size'] / 1e6:8.2f} MB  {name}" for name, entry in manifest["files"].items()]
    lines += ["", "     raw  compressed (MB), by directory"]
    top = sorted(_directories(files).items(), key=lambda item: -item[1][1])[:most]
    lines += [f"{size / 1e6:8.2f} {packed / 1e6:8.2f}  {name}" for name, (size, packed) in top]
    lines += ["", "     raw  compressed (MB), largest files"]
    largest = sorted(files.items(), key=lambda item: -item[1][1])[:most]
    lines += [f"{size / 1e6:8.2f} {packed / 1e6:8.2f}  {name}" for name, (size, packed) in largest]
    return "\n".join(lines) + "\n"


def compare(first: Path, second: Path, most: int) -> str:
    """How much larger (+) or smaller (-) `second` is than `first`: whole files, then the directories of
    the initrd that differ most. Raises `UserError` when one of them is no build."""
    (old, old_files), (new, new_files) = _read(first), _read(second)
    lines = [f"{first} ({old['engine']}) -> {second} ({new['engine']})"]
    for name in sorted(set(old["files"]) | set(new["files"])):
        before, after = (each["files"].get(name, {"size": 0})["size"] for each in (old, new))
        lines.append(f"{before / 1e6:8.2f} -> {after / 1e6:8.2f} MB  {(after - before) / 1e6:+8.2f}  {name}")
    before_by, after_by = _directories(old_files), _directories(new_files)
    changes = {name: after_by.get(name, (0, 0))[1] - before_by.get(name, (0, 0))[1] for name in {*before_by, *after_by}}
    lines += ["", "compressed, MB, by directory of the initrd"]
    ranked = sorted(changes.items(), key=lambda item: (-abs(item[1]), item[0]))[:most]
    lines += [f"{change / 1e6:+8.2f}  {name}" for name, change in ranked if change]
    return "\n".join(lines) + "\n"


Sizes = dict[str, tuple[int, int]]
"""Path -> bytes raw and compressed."""


def _read(os_directory: Path) -> tuple[dict[str, Any], Sizes]:
    try:
        manifest: dict[str, Any] = json.loads((os_directory / "manifest.json").read_text())
        archive = gzip.decompress((os_directory / "initrd.gz").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{os_directory} is not a build: {error}", "invoke build") from None
    return manifest, {name: (len(data), len(zlib.compress(data, 6))) for name, data in members(archive) if data}


def _directories(files: Sizes) -> Sizes:
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for name, (size, packed) in files.items():
        total = totals["/".join(name.split("/")[:3])]
        total[0] += size
        total[1] += packed
    return {name: (size, packed) for name, (size, packed) in totals.items()}


def members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a newc archive as `hostos.cpio` writes it."""
    position = 0
    while archive[position : position + 6] == b"070701":
        fields = [int(archive[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        name_end = position + _HEADER + fields[11]
        name = archive[position + _HEADER : name_end - 1].decode(errors="replace")
        data = name_end + (-(_HEADER + fields[11]) % 4)
        if name == "TRAILER!!!":
            return
        yield name, archive[data : data + fields[6]]
        position = data + fields[6] + (-fields[6] % 4)
