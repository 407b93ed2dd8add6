"""A root file system as a list of entries in memory: nothing here needs root, fakeroot or a mount."""

from __future__ import annotations

import fnmatch
import io
import os
import posixpath
import re
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from hostos.cpio import Entry
from hostos.errors import UserError, failure

# /bin, /sbin, /lib and /lib64 are links into /usr in every tree we make.
MERGED = ("bin", "sbin", "lib", "lib64")
_TYPES = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


@dataclass
class Tree:
    """path (relative, no leading slash) -> `Entry`. Later additions replace earlier ones; merging a
    directory over a directory keeps what is below it."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def __contains__(self, path: str) -> bool:
        return path in self.entries

    def add(self, entry: Entry) -> None:
        path = normal(os.fsdecode(entry.name))
        if path == ".":
            return
        self.entries[path] = replace(entry, path=path)

    def directory(self, path: str, mode: int = 0o755) -> None:
        self.add(Entry(path, stat.S_IFDIR | mode, nlink=2))

    def file(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        self.add(Entry(path, stat.S_IFREG | mode, data=data.encode() if isinstance(data, str) else data))

    def link(self, path: str, target: str) -> None:
        self.add(Entry(path, stat.S_IFLNK | 0o777, data=os.fsencode(target)))

    def data(self, path: str) -> bytes:
        """The content of a file, following symbolic links. Raises KeyError when there is none."""
        return self.entries[self.resolve(path)].data

    def resolve(self, path: str) -> str:
        """`path` with every symbolic link in it followed (links are taken relative to this tree's
        root). The result need not exist. Raises KeyError for a loop."""
        todo = [part for part in normal(path).split("/") if part != "."]
        done: list[str] = []
        links = 0
        while todo:
            part = todo.pop(0)
            if part == "..":
                done[-1:] = []
                continue
            if not done and part in MERGED:
                done = ["usr", part]
                continue
            here = "/".join([*done, part])
            entry = self.entries.get(here)
            if entry is None or not stat.S_ISLNK(entry.mode):
                done.append(part)
                continue
            if (links := links + 1) > 40:
                raise KeyError(f"{path}: too many symbolic links")
            target = os.fsdecode(entry.data)
            if target.startswith("/"):
                done = []
            todo = [each for each in target.split("/") if each not in ("", ".")] + todo
        return "/".join(done)

    def remove(self, *patterns: str) -> None:
        """Remove what matches a shell pattern, with everything below it. `*` also matches `/`."""
        if not patterns:
            return
        wanted = re.compile("|".join(f"(?:{fnmatch.translate(each)})" for each in patterns))
        self.filter(lambda path, _: not any(wanted.match(each) for each in (path, *parents(path))))

    def filter(self, keep: Callable[[str, Entry], bool]) -> None:
        self.entries = {path: entry for path, entry in self.entries.items() if keep(path, entry)}

    def below(self, directory: str) -> Iterator[str]:
        """The names directly in `directory`."""
        prefix = f"{directory}/"
        for path in list(self.entries):
            if path.startswith(prefix) and "/" not in path[len(prefix) :]:
                yield path

    def size(self) -> int:
        """Bytes of file content."""
        return sum(len(entry.data) for entry in self.entries.values() if stat.S_ISREG(entry.mode))

    def sorted(self) -> list[Entry]:
        """All entries by path, every parent directory present and before what it holds."""
        for path in list(self.entries):
            for parent in parents(path):
                if parent not in self.entries:
                    self.directory(parent)
        return [self.entries[path] for path in sorted(self.entries)]


def parents(path: str) -> Iterator[str]:
    """The directories above `path`, nearest first."""
    while path := posixpath.dirname(path):
        yield path


def normal(path: str) -> str:
    """The path relative to the root with /bin, /sbin, /lib and /lib64 moved into /usr.

    Raises `UserError` for a path that leaves the root.
    """
    clean = posixpath.normpath(path.lstrip("/") or ".")
    if clean == ".." or clean.startswith("../"):
        raise UserError(f"{path!r} leaves the root of the file system")
    first, slash, rest = clean.partition("/")
    return f"usr/{first}/{rest}" if slash and first in MERGED else clean


def from_tar(stream: io.BufferedIOBase, source: str, wanted: Callable[[str], bool]) -> Iterable[Entry]:
    """The entries of a tar stream whose path is `wanted`, hard links as files of their own.

    Raises `UserError` when the stream is no tar archive (`source` names it).
    """
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                path = normal(member.name)
                if not wanted(path):
                    continue
                mode = _TYPES.get(member.type, stat.S_IFREG) | (member.mode & 0o7777)
                rdev = (member.devmajor, member.devminor) if member.ischr() or member.isblk() else (0, 0)
                data = b""
                if member.issym():
                    data = os.fsencode(member.linkname)
                elif member.islnk():
                    data = contents[normal(member.linkname)]
                elif member.isreg():
                    handle = archive.extractfile(member)
                    assert handle is not None
                    data = contents[path] = handle.read()
                yield Entry(path, mode, member.uid, member.gid, 0, data, rdev)
    except (tarfile.TarError, KeyError) as error:
        raise UserError(f"{source} cannot be read as a tar archive: {error}") from None


def from_package(package: Path, wanted: Callable[[str], bool]) -> Iterable[Entry]:
    """The files of a .deb, without running anything of it. Raises `UserError` when it is damaged."""
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        yield from from_tar(process.stdout, package.name, wanted)  # type: ignore[arg-type]
    finally:
        process.stdout.close()
        errors = process.stderr.read().decode(errors="replace").strip()
        process.stderr.close()
        status = process.wait()
    if status != 0:
        raise failure(f"{package.name} is damaged: {errors}", f"rm {package} && invoke build")


def from_directory(root: Path) -> Iterable[Entry]:
    """The files below `root`, owned by root, executable where they are executable here; mode bits
    are otherwise 0644/0755, so that a umask or a checkout cannot change the result."""
    for parent, directories, files in os.walk(root):
        directories.sort()
        for name in [*files, *(each for each in directories if (Path(parent) / each).is_symlink())]:
            path = Path(parent) / name
            relative = path.relative_to(root).as_posix()
            status = path.lstat()
            if path.is_symlink():
                yield Entry(relative, stat.S_IFLNK | 0o777, data=os.fsencode(path.readlink()))
            else:
                mode = 0o755 if status.st_mode & 0o100 else 0o644
                yield Entry(relative, stat.S_IFREG | mode, data=path.read_bytes())
