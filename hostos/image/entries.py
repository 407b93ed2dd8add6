"""The entries of a file tree, whatever it was read from, and what makes a tree packable."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from hostos.errors import UserError

MAX_NAME = 255
MAX_PATH = 4095
MAX_LINK = 4095
MAX_ID = (1 << 32) - 1
MAX_TIME = (1 << 32) - 1
MAX_FILE = 1 << 42
MAX_MAJOR, MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1

XATTR_PREFIXES = (b"user.", b"trusted.", b"security.")
"""The kinds of extended attribute squashfs can hold."""
ACL_XATTRS = (b"system.posix_acl_access", b"system.posix_acl_default")
"""What entries have besides; layers hold them in another way (hostos.image.acls)."""

Segments = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Entry:
    """One name in a tree.

    `path`: relative, no `.` or `..`, no final slash; `b""` is the root. `mode`: type and permission
    bits as in stat(2). `mtime`: whole seconds (squashfs has no finer ones). `target`: of a symbolic
    link. `link`: path of the entry this one is a hard link to. `size`: bytes of a regular file, whose
    content `open()` gives; `segments` are its parts that aren't holes, as (offset, length).
    """

    path: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    target: bytes = b""
    link: bytes | None = None
    major: int = 0
    minor: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    segments: Segments = ()
    open: Callable[[], BinaryIO] | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The path for messages, with undecodable bytes and control characters escaped."""
        return printable(self.path)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode) and self.link is None

    def read(self, limit: int) -> bytes:
        """The first `limit` bytes of a regular file without holes there."""
        if self.open is None:
            return b""
        with self.open() as file:
            return file.read(limit)


def is_kept(key: bytes) -> bool:
    """Whether a layer can hold the extended attribute."""
    return key.startswith(XATTR_PREFIXES) or key in ACL_XATTRS


def printable(path: bytes) -> str:
    text = "/" + path.decode(errors="backslashreplace")
    return text if text.isprintable() else ascii(text)[1:-1]


def clean_path(raw: bytes, what: str) -> bytes:
    """`raw` without leading `./` and `/`-repetition. Raises UserError if it leaves the tree."""
    if raw.startswith(b"/"):
        raise UserError(f"{what}: absolute path {printable(raw[1:])}", "pack with paths relative to the tree")
    parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise UserError(f"{what}: a path leaves the tree: {printable(raw)}", "the archive is not a root file system")
    return b"/".join(parts)


def arrange(entries: Iterable[Entry], what: str) -> list[Entry]:
    """Check a tree and make it whole: sorted by path, a later entry replaces an earlier one of the
    same path, missing parents are made (root, 0755), hard links point at the first of their names.

    Raises UserError for trees no file system can hold: a parent that is not a directory, a hard
    link to nothing, sizes and ids out of range.
    """
    tree: dict[bytes, Entry] = {}
    files: dict[bytes, int] = {}  # which file a name belongs to: hard links share a number
    for number, entry in enumerate(entries):
        check(entry, what)
        file = number
        if entry.link is not None:
            target = _linked(entry, tree, what)
            file = files[target.path]
            entry = replace(target, path=entry.path)
        tree[entry.path], files[entry.path] = entry, file
    for path in list(tree):
        while path:
            path = path.rpartition(b"/")[0]
            if path in tree:
                if not stat.S_ISDIR(tree[path].mode):
                    raise UserError(f"{what}: {tree[path].name} has entries below it but is not a directory")
                break
            tree[path] = Entry(path, stat.S_IFDIR | 0o755)
    tree.setdefault(b"", Entry(b"", stat.S_IFDIR | 0o755))
    if not stat.S_ISDIR(tree[b""].mode):
        raise UserError(f"{what}: its root is not a directory")
    return _first_names(tree, files)


def check(entry: Entry, what: str) -> None:
    """Raises UserError if squashfs or Linux can't hold `entry`."""

    def bad(why: str) -> UserError:
        return UserError(f"{what}: {entry.name}: {why}")

    if len(entry.path) > MAX_PATH or any(len(part) > MAX_NAME for part in entry.path.split(b"/")):
        raise UserError(f"{what}: {entry.name[:100]}…: the name is too long")
    if b"\0" in entry.path or b"\0" in entry.target:
        raise bad("a NUL byte in its name")
    if not 0 <= entry.uid <= MAX_ID or not 0 <= entry.gid <= MAX_ID:
        raise bad(f"owner {entry.uid}:{entry.gid} is out of range")
    if not 0 <= entry.size <= MAX_FILE:
        raise bad(f"size {entry.size} is out of range")
    if not 0 <= entry.major <= MAX_MAJOR or not 0 <= entry.minor <= MAX_MINOR:
        raise bad(f"device {entry.major}:{entry.minor} is out of range")
    if stat.S_ISLNK(entry.mode) and entry.link is None and not 0 < len(entry.target) <= MAX_LINK:
        raise bad("its link target is empty or too long")
    end = 0
    for offset, length in entry.segments:
        if offset < end or length < 0 or offset + length > entry.size:
            raise bad("its map of holes is damaged")
        end = offset + length
    for key, _ in entry.xattrs:
        if b"=" in key or b"\0" in key or not 0 < len(key) <= MAX_NAME:
            raise bad(f"extended attribute {key!r} can't be stored")


def _linked(entry: Entry, tree: dict[bytes, Entry], what: str) -> Entry:
    """What a hard link names: it takes all of its properties, except the path."""
    assert entry.link is not None
    target = tree.get(entry.link)
    if target is None or target.path == entry.path:
        raise UserError(f"{what}: {entry.name} is a hard link to {printable(entry.link)}, which isn't there")
    if stat.S_ISDIR(target.mode):
        raise UserError(f"{what}: {entry.name} is a hard link to a directory")
    return target


def _first_names(tree: dict[bytes, Entry], files: dict[bytes, int]) -> list[Entry]:
    """Sorted; of the names of one file the first is the file and the others link to it."""
    first: dict[int, bytes] = {}
    result = []
    for path in sorted(tree, key=lambda path: path.split(b"/") if path else []):
        name = first.setdefault(files[path], path) if path in files else path
        result.append(replace(tree[path], link=None if name == path else name))
    return result
