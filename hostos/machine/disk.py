"""A machine's disk: where what it has fetched outlives it (docs/storage.md).

Either a sparse file in the machine's directory, made and grown here, or a file of the user's. The guest makes
the file system (ext4) on first use; what holds anything is never formatted, and nothing is ever shrunk.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hostos.errors import UserError

# What the guest finds it by.
SERIAL = "hostos-disk"
OWN_NAME = "disk.img"
# ext4 with a journal, and some room.
SMALLEST = 64 << 20
# ext4 with blocks of 4 KiB.
LARGEST = 16 << 40
_SIZE = re.compile(r"([0-9]{1,12})([KMGT]?)(?:i?B)?", re.I)
_QCOW2_MAGIC = b"QFI\xfb"


@dataclass(frozen=True)
class Disk:
    """A disk as QEMU is to have it. `grow_to`: bytes the file is to have (0: as it is); `format`:
    the guest may make a file system if it finds none."""

    file: Path
    kind: Literal["raw", "qcow2"] = "raw"
    grow_to: int = 0
    format: bool = False


def parse_size(text: str) -> int | None:
    """Bytes from `20G`, `512M` (powers of 1024); None if it is no size."""
    match = _SIZE.fullmatch(text)
    if not match:
        return None
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2].upper()]


def normalise(text: str) -> str:
    """`--disk` as it is remembered: `none`, a size, or an absolute path. Raises UserError."""
    if text == "none" or parse_size(text) is not None:
        return text
    if not text:
        raise UserError("--disk '' is not a disk", "give a size, e.g. --disk 20G, or a file")
    return str(Path(text).expanduser().absolute())


def plan_disk(text: str, directory: Path) -> Disk | None:
    """What `--disk text` means for the machine in `directory`; changes nothing. Raises UserError."""
    if text == "none":
        return None
    size = parse_size(text)
    if size is None:
        return _named(Path(text))
    if not SMALLEST <= size <= LARGEST:
        raise UserError(f"a disk of {text} is not possible", f"give between {SMALLEST >> 20}M and {LARGEST >> 40}T")
    file = directory / OWN_NAME
    try:
        present = file.stat().st_size
    except FileNotFoundError:
        present = 0
    if present > size:
        raise UserError(
            f"the disk has {human(present)}, and {text} is less: disks are never shrunk",
            f"--disk {present >> 20}M or more; to begin anew, delete {file}",
        )
    return Disk(file, grow_to=size, format=True)


def _named(file: Path) -> Disk:
    try:
        with file.open("r+b", buffering=0) as stream:
            start = stream.read(4)
            size = os.fstat(stream.fileno()).st_size
            empty = not _has_data(stream.fileno(), size)
    except FileNotFoundError:
        hint = f"make it: truncate -s 20G {file}; or give a size and hostos makes one: --disk 20G"
        raise UserError(f"the disk {file} does not exist", hint) from None
    except IsADirectoryError:
        raise UserError(f"the disk {file} is a directory", "name a file, or give a size: --disk 20G") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"the disk {file} cannot be used: {reason}", "it must be writable") from None
    if not file.is_file():
        raise UserError(f"the disk {file} is not a plain file", "make one: truncate -s 20G FILE")
    if file.suffix == ".qcow2":
        if start != _QCOW2_MAGIC:
            raise UserError(f"the disk {file} is called qcow2 and isn't", "qemu-img create -f qcow2 FILE 20G")
        # Only the guest can tell whether there is something in it; it looks for more than a file system then.
        return Disk(file, "qcow2")
    if size < SMALLEST:
        raise UserError(
            f"the disk {file} is too small: {human(size)}", f"it needs {SMALLEST >> 20}M: truncate -s 20G FILE"
        )
    return Disk(file, format=empty)


def _has_data(descriptor: int, size: int) -> bool:
    """Whether anything was ever written; file systems that can't tell say yes."""
    try:
        return os.lseek(descriptor, 0, os.SEEK_DATA) < size
    except OSError:
        # ENXIO: nothing but a hole.
        return False


def same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def prepare(disk: Disk) -> None:
    """Make or grow the file. Raises OSError (full or read-only file system)."""
    if not disk.grow_to:
        return
    # Sparse: it takes room as it is written to.
    descriptor = os.open(disk.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size < disk.grow_to:
            os.truncate(descriptor, disk.grow_to)
    finally:
        os.close(descriptor)


def options(disk: Disk) -> list[list[str]]:
    """QEMU's options. What the guest gives up is given back to the host; a host that is full is an
    error the guest sees, not a machine that stands still."""
    path = str(disk.file).replace(",", ",,")
    node = f"driver={disk.kind},node-name=disk,discard=unmap,detect-zeroes=unmap"
    return [
        ["-blockdev", f"{node},file.driver=file,file.filename={path},file.discard=unmap"],
        ["-device", f"virtio-blk-pci,drive=disk,serial={SERIAL},werror=report,rerror=report"],
    ]


def human(size: int) -> str:
    for unit, name in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if size >= 1 << unit:
            return f"{size / (1 << unit):.4g} {name}"
    return f"{size} bytes"
