"""Trees on disk, as the sandbox's users see them: layers unpacked for an overlay, upper directories read back.

Inside a user namespace no device can be made (but whiteouts can) and no `trusted.*` attribute be set, so
what is unpacked here is for running a build step on, not for packing again: what a layer holds comes
from its archive, and a step's layer only from what the step changed.
"""

# Names in a tree are bytes, which pathlib doesn't take.
# ruff: noqa: PTH101, PTH102, PTH123, PTH211

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, cast

from hostos.errors import failure
from hostos.image import overlay, sandbox
from hostos.image.entries import ACL_XATTRS, Entry, arrange
from hostos.image.layers import read_layer
from hostos.image.pack import write_tar
from hostos.image.sandbox import Ids
from hostos.image.sources import read_directory, read_plain_tar
from hostos.live.torrents import Torrent
from hostos.steps import Steps


def unpacked(torrent: Torrent, layer: Path, who: Ids, steps: Steps) -> Path:
    """The layer as a directory in `sandbox.scratch()`, unpacked unless it is there. Raises UserError."""
    trees = sandbox.scratch() / "t"
    trees.mkdir(mode=0o711, exist_ok=True)
    trees.chmod(0o711)
    place = trees / torrent.info_hash[:20]
    if place.is_dir():
        return place
    with steps.step(f"unpack {torrent.info_hash[:16]}") as step, ExitStack() as stack:
        entries = read_layer(layer, stack)
        new = sandbox.own(trees / f"{place.name}.{os.getpid()}", who)
        try:
            inside(lambda: _unpack(entries, new), who, f"unpacking {layer.name}")
            new.rename(place)
        except BaseException:
            remove(new, who)
            raise
        step.detail = f"{len(entries)} entries"
    return place


def read_upper(upper: Path, who: Ids, stack: ExitStack) -> list[Entry]:
    """What an overlay's upper directory holds, as a layer (not arranged); contents readable while `stack` is open."""
    spool = cast(BinaryIO, tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", "/var/tmp")))  # noqa: SIM115
    stack.enter_context(spool)

    def send() -> int:
        sandbox.become(upper)
        found = arrange(read_directory(Path("/"), Steps()), "the changes")
        with Steps().step("") as step, os.fdopen(os.dup(spool.fileno()), "wb") as out:
            write_tar(found, out, 0, step, {})
        return 0

    inside(send, who, "reading what the step changed")
    spool.seek(0)
    entries, _ = read_plain_tar(spool, upper, stack)
    return overlay.from_upper(entries, prefix=overlay.UNPRIVILEGED_PREFIX)


def remove(path: Path, who: Ids) -> None:
    """Remove a directory that belongs to the sandbox's users."""
    if not path.exists():
        return

    def empty() -> int:
        for name in os.listdir(path):  # noqa: PTH208
            each = path / name
            if each.is_dir() and not each.is_symlink():
                shutil.rmtree(each, ignore_errors=True)
            else:
                each.unlink(missing_ok=True)
        return 0

    with suppress(Exception):
        inside(empty, who, f"removing {path}")
    shutil.rmtree(path, ignore_errors=True)


def inside(work: sandbox.Work, who: Ids, what: str) -> None:
    """Do something in a sandbox; raises a failure with the last it said if it does not succeed."""
    with tempfile.TemporaryFile() as log:
        if sandbox.run(work, log.fileno(), who=who):
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
            raise failure(f"{what}: {said[-1] if said else 'failed'}", f"is there space in {sandbox.scratch()}?")


def _unpack(entries: list[Entry], root: Path) -> int:
    sandbox.become(root)
    os.umask(0)
    directories = []
    for entry in entries:
        path = b"/" + entry.path
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFDIR:
            if entry.path:
                os.mkdir(path, 0o700)
            directories.append(entry)
            continue
        if entry.link is not None:
            with suppress(FileNotFoundError):  # of a device that could not be made
                os.link(b"/" + entry.link, path, follow_symlinks=False)
            continue
        if kind == stat.S_IFREG:
            _write(entry, path)
        elif kind == stat.S_IFLNK:
            os.symlink(entry.target, path)
        elif kind == stat.S_IFIFO:
            os.mkfifo(path)
        elif overlay.is_whiteout(entry):
            os.mknod(path, stat.S_IFCHR, 0)
            continue
        else:
            continue
        _dress(entry, path)
    for entry in reversed(directories):
        _dress(entry, b"/" + entry.path)
    return 0


def _write(entry: Entry, path: bytes) -> None:
    with open(path, "xb") as target:
        if entry.open is not None:
            with entry.open() as source:
                for offset, length in entry.segments:
                    source.seek(offset)
                    target.seek(offset)
                    left = length
                    while left and (data := source.read(min(left, 1 << 20))):
                        target.write(data)
                        left -= len(data)
        target.truncate(entry.size)


def _dress(entry: Entry, path: bytes) -> None:
    os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
    if not stat.S_ISLNK(entry.mode):
        os.chmod(path, stat.S_IMODE(entry.mode))
    for key, value in entry.xattrs:
        if key in ACL_XATTRS:
            # Without it, a step would see another tree than the one who boots the image.
            os.setxattr(path, key, value, follow_symlinks=False)
            continue
        if key.startswith(overlay.PREFIX):
            key = overlay.UNPRIVILEGED_PREFIX + key[len(overlay.PREFIX) :]
        # trusted.* and most of security.* can't be set in here.
        with suppress(OSError):
            os.setxattr(path, key, value, follow_symlinks=False)
    os.utime(path, (entry.mtime, entry.mtime), follow_symlinks=False)
