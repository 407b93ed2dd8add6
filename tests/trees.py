"""Everything about a tree that an image must keep, to be compared."""

# Names in a tree are bytes, which pathlib doesn't take.
# ruff: noqa: PTH115, PTH208

from __future__ import annotations

import hashlib
import os
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any


def snapshot(root: Path) -> dict[bytes, tuple[Any, ...]]:
    """By path: mode, owner, time, digest of the content, which names are one file, how many, attributes (with ACLs)."""
    result: dict[bytes, tuple[Any, ...]] = {}
    groups: dict[tuple[int, int], bytes] = {}
    top = os.fsencode(root)
    pending = [b""]
    while pending:
        path = pending.pop()
        full = top + b"/" + path if path else top
        status = os.lstat(full)
        mode = status.st_mode
        content: Any = None
        if stat.S_ISLNK(mode):
            content = os.readlink(full)
        elif stat.S_ISREG(mode):
            content = hashlib.sha256(Path(os.fsdecode(full)).read_bytes()).hexdigest()
        elif stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
            content = (os.major(status.st_rdev), os.minor(status.st_rdev))
        elif stat.S_ISDIR(mode):
            pending += sorted((path + b"/" + name if path else name for name in os.listdir(full)), reverse=True)
        same = b"" if stat.S_ISDIR(mode) else groups.setdefault((status.st_dev, status.st_ino), path)
        links = 0 if stat.S_ISDIR(mode) else status.st_nlink
        xattrs = tuple(
            (k, os.getxattr(full, k, follow_symlinks=False)) for k in sorted(os.listxattr(full, follow_symlinks=False))
        )
        result[path] = (mode, status.st_uid, status.st_gid, int(status.st_mtime), content, same, links, xattrs)
    return result


def add_what_is_hard(tree: Path) -> None:
    """What only root can make, to a tree with `usr/bin/prog`, `etc/motd`, `link` (a symbolic one) and `pipe`.

    Raises OSError if the file system holds no extended attributes.
    """
    (tree / "suid").write_bytes(b"x" * 200_001)
    os.chown(tree / "suid", 1000, 70_000)
    (tree / "suid").chmod(0o6755)
    (tree / "sticky").mkdir()
    (tree / "sticky").chmod(0o1777)
    os.mknod(tree / "null", 0o20666, os.makedev(1, 3))
    os.mknod(tree / "disk", 0o60660, os.makedev(259, 70_000))
    os.mknod(tree / "whiteout", 0o20000, os.makedev(0, 0))
    os.link(tree / "link", tree / "link2", follow_symlinks=False)
    os.chown(tree / "link", 5, 4_000_000_000, follow_symlinks=False)
    with (tree / "sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"middle")
        file.truncate(9 << 20)
    with (tree / "hole").open("wb") as file:
        file.truncate(3 << 20)
    os.utime(tree / "suid", (1 << 31, (1 << 32) - 1))
    os.utime(tree / "sticky", (0, 0))
    # cap_net_raw+ep, as setcap(8) writes it (VFS_CAP_REVISION_2)
    os.setxattr(tree / "usr/bin/prog", "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))
    os.setxattr(tree / "etc/motd", "user.binary", b"\0\xff\n=")
    os.setxattr(tree / "etc", "trusted.overlay.opaque", b"y")
    os.setxattr(tree, "user.root", b"r" * 1000)
    set_acls(tree)
    os.chown(tree, 7, 8)
    tree.chmod(0o750)
    os.utime(tree, (1_500_000_000, 1_500_000_000))


def set_acls(tree: Path) -> None:
    """ACLs of everything that can have one. Needs root, as ids beyond a user's own are in them."""
    (tree / "shared").mkdir()
    (tree / "shared/new\nline\\ \udcff").write_text("odd")
    (tree / "shared/one").write_text("two names")
    os.link(tree / "shared/one", tree / "shared/two")
    everything = "u:1000:rwx,u:2000000000:r,g:70000:rx,m::rwx"
    for path in ("suid", "null", "pipe", "shared", "shared/new\nline\\ \udcff", "shared/one", "."):
        subprocess.run(["setfacl", "-m", everything, tree / path], check=True)
    subprocess.run(["setfacl", "-d", "-m", "u::rwx,g::rx,o::-,u:33:rw", tree / "shared", tree], check=True)
    os.chown(tree / "shared/one", 12, 13)
    os.utime(tree / "shared", (3, 3))
    os.utime(tree / "shared/one", (4, 4))
