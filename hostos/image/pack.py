"""Packs a DIR or a TAR into one squashfs layer; takes a SQUASHFS as it is.

Both DIR and TAR are read entry by entry, brought into one form and one order, and given to
tar2sqfs (squashfs-tools-ng) as one tar stream. So nothing needs root, no entry passes through a
file system that might not be able to hold it, and the same tree gives the same bytes whichever way
it came. Why tar2sqfs and not sqfstar (squashfs-tools 4.5): that one drops owner, mode, time and
attributes of the root directory and refuses PAX sparse files.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hostos.errors import UserError, failure
from hostos.hostsystem import install
from hostos.image import acls, squashfs
from hostos.image.architecture import ARCHITECTURES, HEADER, elf_machine, likely_programs
from hostos.image.entries import Entry, arrange
from hostos.image.order import boot_rank
from hostos.image.sources import read_directory, read_tar
from hostos.live.acl import FILE as LIST_OF_ACLS
from hostos.steps import Step, Steps

BLOCK_SIZE = 128 * 1024
"""Squashfs block size, bytes."""
LEVEL = 15
"""zstd level."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Packed:
    """A layer ready to be stored. `entries`: names in the tree; `unpacked`: bytes of its files."""

    path: Path
    architecture: str
    size: int
    entries: int
    unpacked: int


def pack(
    source: Path,
    target: Path,
    steps: Steps,
    *,
    architecture: str | None = None,
    order: Mapping[bytes, int] | None = None,
) -> Packed:
    """Pack `source` (directory, tar archive or squashfs file) into the new file `target`.

    `architecture` overrides what the tree's programs say; `order`: paths whose contents come first,
    the smallest number first (a squashfs file is taken as it is all the same). Raises UserError for input that can't be
    taken (status 2), a failure when packing breaks off (status 1); then `target` is useless.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise UserError(f"architecture {architecture!r} is not known", f"one of {', '.join(ARCHITECTURES)}")
    kind = kind_of(source)
    if kind == "squashfs":
        return _take(source, target, steps, architecture)
    with ExitStack() as stack:
        if kind == "directory":
            with steps.step(f"read {source}") as step:
                found = read_directory(source, steps)
                step.detail = f"{len(found)} entries"
        else:
            found = read_tar(source, stack, steps)
        entries = arrange(found, str(source))
        machine = architecture or architecture_of(entries)
        if machine is None:
            raise no_architecture(source)
        return pack_entries(entries, target, machine, steps, order=order)


def pack_entries(
    entries: list[Entry],
    target: Path,
    architecture: str,
    steps: Steps,
    *,
    order: Mapping[bytes, int] | None = None,
    level: int = LEVEL,
) -> Packed:
    """Pack a tree (as `arrange` gives it) into the new file `target`; `level`: zstd's. See `pack`."""
    entries = acls.listed(acls.absorbed(entries, "the tree"))
    unpacked = sum(length for entry in entries if entry.is_file for _, length in entry.segments)
    with steps.step("pack") as step:
        _feed(entries, target, unpacked, step, order or {}, level)
        size = target.stat().st_size
        step.detail = f"{unpacked >> 20} MiB in {len(entries)} entries -> {size >> 20} MiB"
    return Packed(target, architecture, size, len(entries), unpacked)


def kind_of(source: Path) -> str:
    """`directory`, `squashfs` or `tar` (whatever else is a file). Raises UserError."""
    try:
        mode = source.stat().st_mode
        if stat.S_ISDIR(mode):
            return "directory"
        if not stat.S_ISREG(mode):
            raise UserError(f"{source} is neither a directory nor a file")
        with source.open("rb") as file:
            head = file.read(4)
    except FileNotFoundError:
        raise UserError(f"{source} does not exist", "give a directory, a tar archive or a squashfs file") from None
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from None
    if not head:
        raise UserError(f"{source} is empty")
    return "squashfs" if head == squashfs.MAGIC else "tar"


def no_architecture(source: Path | str) -> UserError:
    return UserError(
        f"{source}: no program in it tells its architecture",
        f"is it a root file system? If so, say it: --arch {os.uname().machine}",
    )


def architecture_of(entries: Iterable[Entry]) -> str | None:
    """What the likeliest program among `entries` is for; None if there is none."""
    files = {e.path: e for e in entries if e.is_file and e.mode & 0o111 and e.size >= HEADER}
    for path in likely_programs(files):
        if machine := elf_machine(files[path].read(HEADER)):
            return machine
    return None


# --- SQUASHFS ---------------------------------------------------------------------------------------


def _take(source: Path, target: Path, steps: Steps, architecture: str | None) -> Packed:
    with steps.step(f"check {source.name}") as step:
        superblock = squashfs.read_superblock(source)
        found = squashfs.architecture(source)
        if architecture is None and found is None:
            raise no_architecture(source)
        step.detail = f"{superblock.compressor}, {superblock.inodes} inodes"
    with steps.step("copy"):
        # A copy: were the user's file changed later, its hash would no longer be true.
        shutil.copyfile(source, target)
    size = target.stat().st_size
    return Packed(target, architecture or found or "", size, superblock.inodes, 0)


# --- DIR and TAR ------------------------------------------------------------------------------------


def _feed(entries: list[Entry], target: Path, total: int, step: Step, order: Mapping[bytes, int], level: int) -> None:
    if not shutil.which("tar2sqfs"):
        raise UserError("tar2sqfs is needed to pack an image", install("squashfs-tools-ng"))
    command = ["tar2sqfs", "--quiet", "--force", "--no-skip", "--no-tail-packing"]
    command += ["--compressor", "zstd", "--comp-extra", f"level={level}", "--block-size", str(BLOCK_SIZE)]
    command += ["--num-jobs", str(os.cpu_count() or 1), str(target)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "0", "LC_ALL": "C"}
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=errors, stderr=errors, env=environment) as process:
            assert process.stdin is not None
            try:
                write_tar(entries, process.stdin, total, step, order)
                process.stdin.close()
            except BrokenPipeError:
                pass  # it gave up and says why on stderr
            except BaseException:
                process.kill()
                raise
            status = process.wait()
        if status:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit status {status}"
            raise failure(f"packing failed: tar2sqfs: {reason}", f"is there space in {target.parent}?")


def write_tar(entries: list[Entry], out: IO[bytes], total: int, step: Step, order: Mapping[bytes, int]) -> None:
    """The whole tree as a tar stream, what a container starts first in front (squashfs keeps the
    order of the contents, directories are sorted by tar2sqfs itself)."""
    done, told = 0, 0.0
    for entry in sorted(entries, key=lambda entry: _place(entry, order)):
        out.write(tar_header(entry))
        if not entry.is_file or entry.open is None:
            continue
        size = len(sparse_map(entry)) if is_sparse(entry) else 0
        if size:
            out.write(sparse_map(entry))
        for data in _content(entry):
            out.write(data)
            size += len(data)
            done += len(data)
            if step.seconds - told > 0.2:
                told = step.seconds
                step.progress(f"{done >> 20} of {total >> 20} MiB ({100 * done // max(total, 1)} %)")
        out.write(bytes(-size % tarfile.BLOCKSIZE))
    out.write(bytes(2 * tarfile.BLOCKSIZE))
    step.progress("finishing")


def _place(entry: Entry, order: Mapping[bytes, int]) -> tuple[int, int, list[bytes]]:
    """Directories before what they hold, files in the order given, then by rank, hard links after all files."""
    parts = entry.path.split(b"/") if entry.path else []
    if stat.S_ISDIR(entry.mode):
        return (0, 0, parts)
    if entry.link is not None:
        return (2, 0, parts)
    if entry.path == LIST_OF_ACLS:
        return (1, -1, parts)  # what mounting the layer reads
    if entry.path in order:
        return (1, order[entry.path], parts)
    return (1, len(order) + (boot_rank(entry.path) if entry.is_file else 0), parts)


def _content(entry: Entry) -> Iterator[bytes]:
    """What is in the file, without its holes."""
    assert entry.open is not None
    with entry.open() as file:
        for offset, length in entry.segments:
            file.seek(offset)
            while length:
                data = file.read(min(length, _CHUNK))
                if not data:
                    raise failure(f"{entry.name} became shorter while it was packed", "publish it again")
                length -= len(data)
                yield data


def is_sparse(entry: Entry) -> bool:
    return entry.size > sum(length for _, length in entry.segments)


def sparse_map(entry: Entry) -> bytes:
    """Map of a sparse file as GNU tar's format 1.0 has it in front of the content."""
    segments = entry.segments
    if not segments or sum(segments[-1]) < entry.size:
        segments = (*segments, (entry.size, 0))  # a hole at the end needs a mark
    numbers = [len(segments), *(number for segment in segments for number in segment)]
    text = "".join(f"{number}\n" for number in numbers).encode()
    return text + bytes(-len(text) % tarfile.BLOCKSIZE)


def tar_header(entry: Entry) -> bytes:
    """The entry's header in PAX format (POSIX.1-2001), attributes as SCHILY.xattr records."""
    info = tarfile.TarInfo(_text(b"./" + entry.path))
    info.mode, info.uid, info.gid, info.mtime = entry.mode & 0o7777, entry.uid, entry.gid, entry.mtime
    pax = {f"SCHILY.xattr.{_text(key)}": _text(value) for key, value in entry.xattrs}
    if entry.link is not None:
        info.type, info.linkname, pax = tarfile.LNKTYPE, _text(b"./" + entry.link), {}
    else:
        info.type = _TAR_TYPES[stat.S_IFMT(entry.mode)]
        info.linkname = _text(entry.target)
        info.devmajor, info.devminor = entry.major, entry.minor
        info.size = entry.size
        if entry.is_file and is_sparse(entry):
            data = sum(length for _, length in entry.segments)
            info.size = len(sparse_map(entry)) + data
            pax |= {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": info.name,
                "GNU.sparse.realsize": str(entry.size),
            }
    info.pax_headers = pax
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


_TAR_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}
