"""Reads a tree from a directory or from a tar archive, entry by entry, without changing anything."""

# Names in a tree are bytes, which pathlib doesn't take.
# ruff: noqa: PTH115, PTH116, PTH118, PTH208
# What is opened here is closed by the caller's ExitStack.
# ruff: noqa: SIM115

from __future__ import annotations

import base64
import binascii
import bz2
import errno
import gzip
import lzma
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from hostos.errors import UserError, failure
from hostos.image import acls
from hostos.image.entries import Entry, Segments, clean_path, is_kept, printable
from hostos.steps import Step, Steps

SPOOL_LIMIT = 1 << 40
"""A compressed archive may unpack to at most this many bytes."""
BOMB_SIZE, BOMB_RATIO = 1 << 30, 200
"""One that unpacks to over 1 GiB may at most be this many times as large as it is."""


# --- directories ------------------------------------------------------------------------------------


def read_directory(root: Path, steps: Steps) -> list[Entry]:
    """All entries below `root`, which is the tree's own root.

    Raises UserError if something can't be read. Sockets are left out with a warning (they are made
    by whoever listens), as are attributes squashfs can't hold.
    """
    walk = _Walk(os.fsencode(root))
    walk.visit(b"")
    if walk.unreadable:
        shown = ", ".join(walk.unreadable[:3]) + (", …" if len(walk.unreadable) > 3 else "")
        raise UserError(
            f"{root}: {len(walk.unreadable)} entries can't be read: {shown}",
            "run it as root, or publish a TAR of the tree made by root",
        )
    _warn(walk.skipped, steps)
    owner = walk.entries[0].uid
    if owner != 0:
        steps.warning(f"{root} belongs to user {owner}: in containers its files will, too (chown it, or use a TAR)")
    return walk.entries


class _Walk:
    def __init__(self, root: bytes) -> None:
        self.root = root
        self.entries: list[Entry] = []
        self.unreadable: list[str] = []
        self.skipped: Counter[str] = Counter()
        self._names: dict[tuple[int, int], bytes] = {}

    def visit(self, top: bytes) -> None:
        pending = [top]
        while pending:
            path = pending.pop()
            full = os.path.join(self.root, path) if path else self.root
            try:
                status = os.stat(full, follow_symlinks=not path)
                entry = self._entry(path, full, status)
                if entry is None:
                    continue
                self.entries.append(entry)
                if stat.S_ISDIR(status.st_mode):
                    names = sorted(os.listdir(full), reverse=True)
                    pending += [path + b"/" + name if path else name for name in names]
            except PermissionError:
                self.unreadable.append(printable(path))
            except OSError as error:
                raise failure(f"{printable(full)[1:]}: {error.strerror}", "does something write to the tree?") from None

    def _entry(self, path: bytes, full: bytes, status: os.stat_result) -> Entry | None:
        mode = status.st_mode
        if stat.S_ISSOCK(mode):
            self.skipped["sockets"] += 1
            return None
        inode = (status.st_dev, status.st_ino)
        link = None
        if status.st_nlink > 1 and not stat.S_ISDIR(mode):
            link = self._names.setdefault(inode, path)
        regular = stat.S_ISREG(mode)
        if regular and not os.access(full, os.R_OK):
            raise PermissionError(errno.EACCES, "", full)
        device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        return Entry(
            path=path,
            mode=mode,
            uid=status.st_uid,
            gid=status.st_gid,
            mtime=max(0, min(int(status.st_mtime), (1 << 32) - 1)),
            size=status.st_size if regular else 0,
            target=os.readlink(full) if stat.S_ISLNK(mode) else b"",
            link=link if link != path else None,
            major=os.major(status.st_rdev) if device else 0,
            minor=os.minor(status.st_rdev) if device else 0,
            xattrs=self._xattrs(full),
            segments=_data_segments(full, status) if regular else (),
            open=_opener(full, status) if regular else None,
        )

    def _xattrs(self, full: bytes) -> tuple[tuple[bytes, bytes], ...]:
        if not hasattr(os, "listxattr"):
            return ()
        found = []
        try:
            for name in sorted(os.listxattr(full, follow_symlinks=False)):
                key = os.fsencode(name)
                if is_kept(key):
                    found.append((key, os.getxattr(full, name, follow_symlinks=False)))
                else:
                    self.skipped[f"{name} attributes"] += 1
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENODATA):
                raise
        return tuple(found)


def _opener(path: bytes, status: os.stat_result) -> Callable[[], BinaryIO]:
    def open_file() -> BinaryIO:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        now = os.fstat(descriptor)
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (status.st_ino, status.st_size, status.st_mtime_ns):
            os.close(descriptor)
            raise failure(
                f"{printable(path)[1:]} changed while it was packed",
                "publish again when nothing writes to the tree",
            )
        return os.fdopen(descriptor, "rb")

    return open_file


def _data_segments(path: bytes, status: os.stat_result) -> Segments:
    """The parts of a file that aren't holes (lseek(2), SEEK_DATA); all of it when it has none."""
    whole = ((0, status.st_size),) if status.st_size else ()
    if status.st_blocks * 512 >= status.st_size:
        return whole
    segments = []
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        end = 0
        while end < status.st_size:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            segments.append((start, min(end, status.st_size) - start))
    except OSError as error:
        if error.errno != errno.ENXIO:  # only a hole is left
            return whole
    finally:
        os.close(descriptor)
    return tuple(segments)


# --- tar archives -----------------------------------------------------------------------------------


def read_tar(path: Path, stack: ExitStack, steps: Steps) -> list[Entry]:
    """All entries of a tar archive (any compression), whose content stays readable while `stack` is open.

    Raises UserError for archives that are damaged, or that try to leave their tree.
    """
    file = stack.enter_context(path.open("rb"))
    with steps.step(f"read {path.name}") as step:
        plain = decompressed(file, path, stack, step)
        entries, skipped = read_plain_tar(plain, path, stack)
        step.detail = f"{len(entries)} entries"
    if not entries:
        raise UserError(f"{path}: an empty archive")
    _warn(skipped, steps)
    return entries


def read_plain_tar(plain: BinaryIO, path: Path, stack: ExitStack) -> tuple[list[Entry], Counter[str]]:
    """All entries of an archive that isn't compressed (any more), and what of it could not be taken.

    `path`: what messages call it. Raises UserError as `read_tar` does.
    """
    skipped: Counter[str] = Counter()
    try:
        archive = tarfile.open(fileobj=plain, mode="r:", encoding="utf-8", errors="surrogateescape")
        stack.enter_context(archive)
        entries = acls.from_archive(_tar_entries(archive, plain, path, skipped), str(path))
        _check_end(archive, plain, path)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a usable tar archive: {error}") from None
    return entries, skipped


def _tar_entries(archive: tarfile.TarFile, plain: BinaryIO, path: Path, skipped: Counter[str]) -> Iterator[Entry]:
    what = str(path)
    end = plain.seek(0, os.SEEK_END)
    plain.seek(0)
    for info in archive:
        name = clean_path(_bytes(info.name), what)
        mode = _TYPES.get(info.type)
        if mode is None:
            raise UserError(f"{what}: {printable(name)} is of type {info.type!r}, which isn't known")
        regular = mode == stat.S_IFREG and not info.islnk()
        sparse = cast("list[tuple[int, int]] | None", info.sparse)
        segments: Segments = ()
        if regular:
            whole = [(0, info.size)] if info.size else []
            segments = tuple((at, length) for at, length in (whole if sparse is None else sparse) if length)
            if info.offset_data + sum(length for _, length in segments) > end:
                raise UserError(f"{what}: it ends in the middle of {printable(name)}")
        device = info.ischr() or info.isblk()
        yield Entry(
            path=name,
            mode=mode | (info.mode & 0o7777),
            uid=info.uid,
            gid=info.gid,
            mtime=max(0, min(int(info.mtime), (1 << 32) - 1)),
            size=info.size if regular else 0,
            target=_bytes(info.linkname) if info.issym() else b"",
            link=clean_path(_bytes(info.linkname), what) if info.islnk() else None,
            major=info.devmajor if device else 0,
            minor=info.devminor if device else 0,
            xattrs=_pax_xattrs(info, skipped),
            segments=segments,
            open=_member(archive, info) if regular else None,
        )


def _check_end(archive: tarfile.TarFile, plain: BinaryIO, path: Path) -> None:
    """`tarfile` takes a damaged header after the first as the end of the archive; we don't."""
    plain.seek(archive.offset)
    block = plain.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        why = "is damaged" if len(block) == tarfile.BLOCKSIZE else "is cut short"
        raise UserError(f"{path}: the archive {why} at byte {archive.offset}")


_TYPES = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.GNUTYPE_SPARSE: stat.S_IFREG,
    tarfile.LNKTYPE: stat.S_IFREG,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Callable[[], BinaryIO]:
    def open_member() -> BinaryIO:
        file = archive.extractfile(info)
        assert file is not None
        return cast(BinaryIO, file)

    return open_member


def _pax_xattrs(info: tarfile.TarInfo, skipped: Counter[str]) -> tuple[tuple[bytes, bytes], ...]:
    """Extended attributes in the spellings of GNU tar and star, libarchive, and Red Hat's tar."""
    found: dict[bytes, bytes] = {}
    for key, value in info.pax_headers.items():
        if key.startswith("SCHILY.xattr."):
            name, data = _bytes(key[len("SCHILY.xattr.") :]), _bytes(value)
        elif key.startswith("LIBARCHIVE.xattr."):
            name = urllib.parse.unquote_to_bytes(key[len("LIBARCHIVE.xattr.") :])
            try:
                data = base64.b64decode(value + "=" * (-len(value) % 4))
            except (binascii.Error, ValueError):
                raise UserError(f"{info.name!r}: its attribute {key} is damaged") from None
            if name in found:
                continue  # bsdtar writes both spellings
        elif key == "RHT.security.selinux":
            name, data = b"security.selinux", _bytes(value)
        elif _bytes(key) in acls.STAR:
            found[_bytes(key)] = _bytes(value)
            continue
        elif key.startswith("SCHILY.acl."):
            skipped["ACLs of NFSv4"] += 1
            continue
        else:
            continue
        if is_kept(name):
            found[name] = data
        else:
            skipped[f"{name.decode(errors='replace')} attributes"] += 1
    return tuple(sorted(found.items()))


def _warn(skipped: Counter[str], steps: Steps) -> None:
    for what, count in sorted(skipped.items()):
        steps.warning(f"{count} {what} left out: a layer can't hold them")


# --- compression ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Compression:
    magic: bytes
    open: Callable[[BinaryIO], BinaryIO] | None = None
    tool: str = ""


_COMPRESSIONS = (
    _Compression(b"\x1f\x8b", lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file))),
    _Compression(b"BZh", lambda file: cast(BinaryIO, bz2.BZ2File(file))),
    _Compression(b"\xfd7zXZ\0", lambda file: cast(BinaryIO, lzma.LZMAFile(file))),
    _Compression(b"]\0\0", lambda file: cast(BinaryIO, lzma.LZMAFile(file))),
    _Compression(b"\x28\xb5\x2f\xfd", tool="zstd"),
    _Compression(b"\x04\x22\x4d\x18", tool="lz4"),
    _Compression(b"LZIP", tool="lzip"),
)


def decompressed(file: BinaryIO, path: Path, stack: ExitStack, step: Step) -> BinaryIO:
    """`file` itself, or an unnamed temporary file with its content unpacked (entries are read in
    another order than they are stored in)."""
    head = file.read(8)
    file.seek(0)
    kind = next((kind for kind in _COMPRESSIONS if head.startswith(kind.magic)), None)
    if kind is None:
        return file
    directory = os.environ.get("TMPDIR", "/var/tmp")
    spool = cast(BinaryIO, tempfile.TemporaryFile(dir=directory))
    stack.enter_context(spool)
    damaged = UserError(f"{path}: its compression is damaged or it is cut short")
    if kind.open:
        try:
            with kind.open(file) as source:
                _spool(source, spool, path, step)
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise damaged from error
        except OSError as error:
            # bz2 says "Invalid data stream" with an OSError that has no number.
            raise damaged if error.errno is None else _disk(error) from error
    else:
        if not shutil.which(kind.tool):
            raise UserError(f"{path}: {kind.tool} is needed to unpack it", f"sudo apt-get install {kind.tool}")
        os.lseek(file.fileno(), 0, os.SEEK_SET)  # the tool starts where the descriptor is
        command = [kind.tool, "-dc"]
        quiet = subprocess.DEVNULL
        process = stack.enter_context(subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=quiet))
        try:
            _spool(cast(BinaryIO, process.stdout), spool, path, step)
        except BaseException as error:
            process.kill()
            raise _disk(error) if isinstance(error, OSError) else error from None
        if process.wait():
            raise damaged
    spool.seek(0)
    return spool


def _disk(error: OSError) -> UserError:
    return failure(f"unpacking to a temporary file: {error.strerror}", "set TMPDIR to a directory with more space")


def _spool(source: BinaryIO, spool: BinaryIO, path: Path, step: Step) -> None:
    size, packed = 0, path.stat().st_size
    while data := source.read(1 << 20):
        size += len(data)
        if size > SPOOL_LIMIT:
            raise UserError(f"{path}: unpacks to more than {SPOOL_LIMIT} bytes")
        if size > BOMB_SIZE and size > BOMB_RATIO * packed:
            raise UserError(f"{path}: unpacks to more than {BOMB_RATIO} times its size: refused", "unpack it yourself")
        spool.write(data)
        step.progress(f"unpacked {size >> 20} MiB")
