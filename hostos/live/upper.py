"""What a container has changed, as a tar stream: `python3 -I upper.py CHANGES ROOT BASE [PID]`.

CHANGES is the upper directory of its root's overlay, ROOT that root, BASE the first user of its range (0: none); with
PID, its processes stand still meanwhile (cgroup v2's freezer). The stream is PAX (POSIX.1-2001) with
attributes as SCHILY.xattr, whiteouts as devices 0:0, owners as the container sees them.
"""

from __future__ import annotations

import os
import stat
import struct
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

IDS = 65536
NOBODY = 65534
FREEZE_LIMIT = 10.0
"""Seconds until its processes must stand still; otherwise it is captured as it runs."""

_CAPABILITY = "security.capability"
# struct vfs_ns_cap_data (linux/capability.h): magic_etc, two pairs of masks, rootid.
_V3, _V2 = 0x03000000, 0x02000000


# Of what only the metadata was copied to the upper directory: the contents are in a layer below (overlayfs, metacopy).
_METACOPY = "trusted.overlay.metacopy"
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")
# linux/posix_acl_xattr.h: version; tag, permissions, id. Of the tags, those that name somebody.
_ACL_HEAD, _ACL_ENTRY, _NAMED = struct.Struct("<I"), struct.Struct("<HHI"), (2, 8)
_RESERVED = ".hostos-acls"


def send(changes: Path, root: Path, base: int, out: BinaryIO) -> None:
    """Write the stream. Raises OSError."""
    names: dict[tuple[int, int], str] = {}
    with tarfile.open(
        fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for path, relative in _walk(changes):
            status = path.lstat()
            mode = status.st_mode
            if stat.S_ISSOCK(mode):
                continue
            info = tarfile.TarInfo(relative or ".")
            info.mode = stat.S_IMODE(mode)
            info.uid, info.gid = _inside(status.st_uid, base), _inside(status.st_gid, base)
            info.mtime = int(status.st_mtime)
            key = (status.st_dev, status.st_ino)
            if status.st_nlink > 1 and not stat.S_ISDIR(mode) and names.setdefault(key, relative) != relative:
                info.type, info.linkname = tarfile.LNKTYPE, names[key]
                archive.addfile(info)
                continue
            info.pax_headers = _attributes(path, base)
            if stat.S_ISREG(mode):
                info.size = status.st_size
                whole = root / relative if _METACOPY in os.listxattr(path) else path
                with whole.open("rb") as file:
                    archive.addfile(info, _Exactly(file))  # type: ignore[arg-type]
                continue
            info.type = _KINDS[stat.S_IFMT(mode)]
            if stat.S_ISLNK(mode):
                info.linkname = os.readlink(path)  # noqa: PTH115 (as it is, not as a Path would spell it)
            elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
            archive.addfile(info)


_KINDS = {
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


class _Exactly:
    """A file that gives as many bytes as are asked for: one that shrinks meanwhile ends in zeros."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        return data + bytes(size - len(data))


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    pending = [(root, "")]
    while pending:
        path, relative = pending.pop()
        yield path, relative
        if path.is_dir() and not path.is_symlink():
            # What a layer calls its list of ACLs is no name for anything else.
            names = sorted((each.name for each in path.iterdir() if each.name != _RESERVED or relative), reverse=True)
            pending += [(path / name, f"{relative}/{name}" if relative else name) for name in names]


def _inside(number: int, base: int) -> int:
    """As the container sees a user; one outside its range is nobody there."""
    if not base:
        return number  # its users are the machine's
    return number - base if base <= number < base + IDS else NOBODY


def _attributes(path: Path, base: int) -> dict[str, str]:
    found = {}
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        value = os.getxattr(path, name, follow_symlinks=False)
        if name == _CAPABILITY:
            value = capability(value, base)
        if name in _ACLS:
            value = acl(value, base)
        if name in _ACLS or name.startswith(("user.", "trusted.", "security.")):
            found[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
    return found


def capability(value: bytes, base: int) -> bytes:
    """File capabilities given by the container's root as its own system knows them: version 2."""
    if len(value) != 24 or struct.unpack_from("<I", value)[0] & 0xFF000000 != _V3:
        return value
    (magic,), (root,) = struct.unpack_from("<I", value), struct.unpack_from("<I", value, 20)
    if root != base:
        return value
    return struct.pack("<I", magic & 0x00FFFFFF | _V2) + value[4:20]


def acl(value: bytes, base: int) -> bytes:
    """An ACL as the container sees it."""
    entries = list(_ACL_ENTRY.iter_unpack(value[_ACL_HEAD.size :]))
    return value[: _ACL_HEAD.size] + b"".join(
        _ACL_ENTRY.pack(tag, bits, _inside(number, base) if tag in _NAMED else number) for tag, bits, number in entries
    )


@contextmanager
def frozen(pid: int | None) -> Iterator[None]:
    """The processes of `pid`'s control group stand still for the body, if they can be made to."""
    freezer = _freezer(pid) if pid else None
    if freezer is None:
        yield
        return
    try:
        with suppress(OSError):
            freezer.write_text("1\n")
            until = time.monotonic() + FREEZE_LIMIT
            while time.monotonic() < until and "frozen 1" not in (freezer.parent / "cgroup.events").read_text():
                time.sleep(0.01)
        yield
    finally:
        with suppress(OSError):
            freezer.write_text("0\n")


def _freezer(pid: int) -> Path | None:
    """Of the group the container is in; never the root's, nor our own."""
    with suppress(OSError):
        paths = [Path(f"/proc/{each}/cgroup").read_text().strip().rpartition("::")[2] for each in (pid, "self")]
        freezer = Path(f"/sys/fs/cgroup{paths[0]}/cgroup.freeze")
        if paths[0] not in ("", "/") and not paths[1].startswith(paths[0]) and freezer.exists():
            return freezer
    return None


def main(arguments: list[str]) -> int:
    changes, root, base, *pid = arguments
    with frozen(int(pid[0]) if pid else None):
        send(Path(changes), Path(root), int(base), sys.stdout.buffer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
