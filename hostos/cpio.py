"""Write cpio archives in the "newc" format, the one the Linux kernel unpacks as an initramfs.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel and its
init/initramfs.c. The output depends on the entries alone: inode numbers are given in order, there
are no device numbers, time stamps are the caller's.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

MAGIC = b"070701"
TRAILER = b"TRAILER!!!"
# init/initramfs.c skips entries whose name, with its NUL, is longer than this.
PATH_MAX = 4096
_MAX_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """One file of an archive.

    `path` is relative to the root ("etc/hostname"; a leading "/" is dropped). `mode` has the type
    bits of stat(2). `data` is the content of a file, or the target of a symbolic link. `rdev` is
    (major, minor) of a device. `mtime` is in seconds since 1970.

    Hard links are entries with the same `ino`, a number chosen by the caller that means nothing
    else; one of them carries the data (or all carry the same). `nlink` is corrected for them.
    """

    path: str | bytes
    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    nlink: int = 1
    ino: int | None = None

    @property
    def name(self) -> bytes:
        """The path as it stands in the archive."""
        return os.fsencode(self.path).strip(b"/") or b"."


def directory(path: str | bytes, permissions: int = 0o755) -> Entry:
    return Entry(path, stat.S_IFDIR | permissions, nlink=2)


def file(path: str | bytes, data: bytes, permissions: int = 0o644) -> Entry:
    return Entry(path, stat.S_IFREG | permissions, data=data)


def write_newc(entries: Iterable[Entry], out: BinaryIO) -> int:
    """Write `entries`, in their order, and the trailer to `out`; returns the number of bytes.

    The order is kept: a directory must come before what it holds (the kernel makes no parents).
    The length is a multiple of four, so archives can follow each other. Of hard links only the
    last carries the data, as GNU cpio writes them: extractors that stop at the first would
    otherwise leave the content out.

    Raises ValueError for what the format cannot say (a name with NUL, ".." or over 4095 bytes, a
    number over 32 bits, the same name twice, links that disagree about the content).
    """
    listed = list(entries)
    links = Counter(entry.ino for entry in listed if entry.ino is not None)
    contents: dict[int, bytes] = {}
    for entry in listed:
        if entry.ino is not None and entry.data:
            if contents.setdefault(entry.ino, entry.data) != entry.data:
                raise ValueError(f"{entry.name!r}: hard links with different content")
            if stat.S_ISDIR(entry.mode):
                raise ValueError(f"{entry.name!r}: a directory has no content")

    written = 0
    numbers: dict[int, int] = {}
    seen: set[bytes] = set()
    left = Counter(links)
    next_number = 1
    for entry in listed:
        _check_name(entry.name, seen)
        data, nlink = entry.data, entry.nlink
        if entry.ino is None:
            number, next_number = next_number, next_number + 1
        else:
            if entry.ino not in numbers:
                numbers[entry.ino], next_number = next_number, next_number + 1
            number = numbers[entry.ino]
            left[entry.ino] -= 1
            if links[entry.ino] > 1 and not stat.S_ISDIR(entry.mode):
                nlink = links[entry.ino]
                data = b"" if left[entry.ino] else contents.get(entry.ino, b"")
        written += _write_entry(out, entry, number, nlink, data)
    return written + _write_entry(out, Entry(TRAILER, 0), 0, 1, b"")


def _check_name(name: bytes, seen: set[bytes]) -> None:
    if b"\0" in name or b".." in name.split(b"/") or len(name) >= PATH_MAX or name == TRAILER:
        raise ValueError(f"{name[:100]!r}: not a name for a cpio archive")
    if name in seen:
        raise ValueError(f"{name!r}: twice in one archive")
    seen.add(name)


def _write_entry(out: BinaryIO, entry: Entry, number: int, nlink: int, data: bytes) -> int:
    name = entry.name + b"\0"
    # fmt: off
    fields = (number, entry.mode, entry.uid, entry.gid, nlink, entry.mtime, len(data),
              0, 0, *entry.rdev, len(name), 0)
    # fmt: on
    if not all(0 <= value <= _MAX_32 for value in fields):
        raise ValueError(f"{entry.name!r}: a number does not fit into 32 bits")
    header = MAGIC + b"".join(b"%08X" % value for value in fields)
    written = 0
    for part in (header + name, data):
        padding = -len(part) % 4
        out.write(part)
        if padding:
            out.write(bytes(padding))
        written += len(part) + padding
    return written
