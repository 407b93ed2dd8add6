"""Everything about a tree that an image must keep, to be compared."""

# Names in a tree are bytes, which pathlib doesn't take.
# ruff: noqa: PTH115, PTH208

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import Any


def snapshot(root: Path) -> dict[bytes, tuple[Any, ...]]:
    """By path: mode, owner, time, content, which names are one file, how many, attributes (with ACLs)."""
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
            content = Path(os.fsdecode(full)).read_bytes()
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
