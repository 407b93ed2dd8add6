"""Squashfs files as they are handed to us: what the superblock says, and what is inside.

Format: https://www.kernel.org/doc/html/latest/filesystems/squashfs.html and linux/squashfs_fs.h.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError
from hostos.hostsystem import install
from hostos.image.architecture import HEADER, elf_machine, likely_programs

MAGIC = b"hsqs"
SUPERBLOCK = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")
ABSENT = (1 << 64) - 1

# Those the guest's kernel can read.
_COMPRESSORS = {1: "gzip", 4: "xz", 5: "lz4", 6: "zstd"}
_ALL_COMPRESSORS = {**_COMPRESSORS, 2: "lzma", 3: "lzo"}

LIST_DEADLINE = 120.0
"""Seconds that reading all of a squashfs file's directories may take."""
_MOST_PROGRAMS = 64


@dataclass(frozen=True)
class Superblock:
    inodes: int
    block_size: int
    compressor: str
    bytes_used: int


def read_superblock(path: Path) -> Superblock:
    """The superblock of `path`, if it is a whole squashfs 4.0 file that the guest can mount.

    Raises UserError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        data = file.read(SUPERBLOCK.size)
    if len(data) < SUPERBLOCK.size or not data.startswith(MAGIC):
        raise UserError(f"{path} is not a squashfs file")
    (
        _, inodes, _, block_size, _, compressor, block_log, _, _, major, minor, _, used,
        id_table, xattr_table, inode_table, directory_table, fragment_table, lookup_table,
    ) = SUPERBLOCK.unpack(data)  # fmt: skip
    if (major, minor) != (4, 0):
        raise UserError(f"{path}: squashfs version {major}.{minor}; only 4.0 can be mounted", "pack it again")
    if compressor not in _COMPRESSORS:
        name = _ALL_COMPRESSORS.get(compressor, f"number {compressor}")
        raise UserError(
            f"{path}: compressed with {name}, which the guest can't read",
            "pack it again with -comp zstd, or publish the directory",
        )
    if not 4096 <= block_size <= 1 << 20 or block_size != 1 << block_log:
        raise UserError(f"{path}: its superblock is damaged (block size {block_size})")
    if used > size:
        raise UserError(f"{path}: cut short: {size} of {used} bytes")
    tables = (id_table, inode_table, directory_table)
    optional = (xattr_table, fragment_table, lookup_table)
    if any(table >= used for table in tables) or any(t >= used for t in optional if t != ABSENT):
        raise UserError(f"{path}: its superblock is damaged")
    return Superblock(inodes, block_size, _COMPRESSORS[compressor], used)


def programs(path: Path) -> list[bytes]:
    """Paths of the regular files that anyone may execute; reads every directory, and so finds
    damage there. Raises UserError."""
    # "-rwxr-xr-x 0/0   35664 2025-03-10 06:12 squashfs-root/usr/bin/env"
    line = re.compile(rb"-[r-][w-][xsS-][r-][w-][xsS-][r-][w-][xtT-] \d+/\d+ +\d+ [\d-]+ [\d:]+ squashfs-root/(.+)")
    found = []
    for text in _unsquashfs(path, ["-lln", str(path)]).split(b"\n"):
        match = line.fullmatch(text)
        if match and b"x" in text[:10]:
            found.append(match[1])
    return found


def architecture(path: Path) -> str | None:
    """The architecture of the first program found in `path`; None if there is none."""
    for name in likely_programs(programs(path))[:_MOST_PROGRAMS]:
        if re.search(rb"[\\*?\[\]\n]", name):
            continue  # unsquashfs takes patterns
        head = _unsquashfs(path, ["-cat", str(path), name.decode("utf-8", "surrogateescape")], limit=HEADER)
        if machine := elf_machine(head):
            return machine
    return None


def _unsquashfs(path: Path, arguments: list[str], limit: int | None = None) -> bytes:
    """Output of unsquashfs; with `limit` only its beginning. Raises UserError if it fails."""
    if not shutil.which("unsquashfs"):
        raise UserError("unsquashfs is needed to look into a squashfs file", install("squashfs-tools"))
    command = ["unsquashfs", "-processors", "1", *arguments]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                if limit is not None:
                    assert process.stdout is not None
                    head = process.stdout.read(limit)
                    process.kill()
                    return head
                output, errors = process.communicate(timeout=LIST_DEADLINE)
            except BaseException:
                process.kill()
                raise
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: unsquashfs can't list it within {LIST_DEADLINE:.0f} s") from None
    if process.returncode:
        reason = errors.decode(errors="replace").strip().splitlines()
        raise UserError(f"{path}: damaged: {reason[-1] if reason else 'unsquashfs failed'}")
    return output
