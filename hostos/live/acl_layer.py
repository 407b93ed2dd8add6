"""A layer's ACLs as one more layer, right above it: a tmpfs with what has ACLs, and nothing of its contents.

Files in there are what overlayfs leaves when it copies only metadata (`trusted.overlay.metacopy`, with the mount option
`metacopy=on`): owner, mode, times, attributes and size count, the contents are those of the layer below. So no
file is fetched or copied for its ACL, the container's own changes stay apart, and users are shifted as in the
layer. https://docs.kernel.org/filesystems/overlayfs.html
"""

# Names in a layer are bytes, which pathlib doesn't take.
# ruff: noqa: PTH101, PTH102

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from hostos.errors import UserError, failure
from hostos.live import syscalls
from hostos.live.acl import FILE, MAX_FILE, Acls, parse

_OVERLAY = "trusted.overlay."


def mount(layer: Path, place: Path) -> bool:
    """Mount the ACLs of the layer mounted at `layer` on `place`, if it has any; whether it has.

    Raises UserError for a list that can't be true of the layer, OSError if the layer can't be read. What was mounted is
    for the caller to unmount, also then.
    """
    try:
        file = os.open(layer / os.fsdecode(FILE), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _bad("it is no file") from None
    with os.fdopen(file, "rb") as stream:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise _bad("it is no file")
        try:
            found = parse(stream.read(MAX_FILE + 1))
        except ValueError as error:
            raise _bad(str(error)) from None
    place.mkdir(parents=True, exist_ok=True)
    syscalls.mount("hostos-acls", place, "tmpfs", syscalls.MS_NODEV, "mode=0755")
    _Copies(os.fsencode(layer), os.fsencode(place)).make(found)
    return True


class _Copies:
    """Nothing of the layer's is followed: it is a stranger's, and this is root."""

    def __init__(self, layer: bytes, place: bytes) -> None:
        self._layer, self._place = layer, place
        self._directories: dict[bytes, os.stat_result] = {}
        self._links: dict[int, bytes] = {}

    def make(self, found: dict[bytes, Acls]) -> None:
        for path, acls in found.items():
            try:
                self._copy(path, acls)
            except FileNotFoundError:
                raise _bad(f"{path[:100]!r} is not in the layer") from None
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EINVAL, errno.EACCES):
                    raise
                why = f"{path[:100]!r}: {error.strerror}"
                raise failure(f"the image's {len(found)} ACLs can't be set: {why}", "is there memory?") from None
        # It is the list itself.
        os.mknod(self._place + b"/" + FILE, stat.S_IFCHR, 0)
        # When all that is in them has been made: it would inherit.
        for path, status in reversed(self._directories.items()):
            if path in found:
                self._give(path, found[path])
            self._times(path, status)

    def _copy(self, path: bytes, acls: Acls) -> None:
        parent, _, _ = path.rpartition(b"/")
        if path:
            self._directory(parent)
        status = os.lstat(self._layer + b"/" + path)
        new = self._place + b"/" + path
        if stat.S_ISDIR(status.st_mode):
            self._directory(path)
            return
        if acls.default:
            raise _bad(f"{path[:100]!r} is no directory")
        if status.st_nlink > 1:
            first = self._links.setdefault(status.st_ino, new)
            if first != new:
                os.link(first, new, follow_symlinks=False)
                return
        if stat.S_ISREG(status.st_mode):
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                os.truncate(file.fileno(), status.st_size)
            os.setxattr(new, f"{_OVERLAY}metacopy", b"")
        elif stat.S_ISLNK(status.st_mode) or (stat.S_ISCHR(status.st_mode) and not status.st_rdev):
            raise _bad(f"{path[:100]!r} can't have any")
        else:
            os.mknod(new, status.st_mode, status.st_rdev)
        self._dress(path, status)
        self._give(path, acls)
        self._times(path, status)

    def _directory(self, path: bytes) -> None:
        """Make a directory, and those it is in, as they are in the layer."""
        if path in self._directories:
            return
        if path:
            self._directory(path.rpartition(b"/")[0])
        status = os.lstat(self._layer + b"/" + path)
        if not stat.S_ISDIR(status.st_mode):
            raise _bad(f"{path[:100]!r} is no directory")
        if path:
            os.mkdir(self._place + b"/" + path, 0o700)
        self._directories[path] = status
        self._dress(path, status)

    def _dress(self, path: bytes, status: os.stat_result) -> None:
        new = self._place + b"/" + path
        os.chown(new, status.st_uid, status.st_gid, follow_symlinks=False)
        os.chmod(new, stat.S_IMODE(status.st_mode))
        # Linux lets nothing else have attributes of users.
        plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        for name, value in attributes(self._layer + b"/" + path).items():
            if plain or not name.startswith("user."):
                os.setxattr(new, name, value, follow_symlinks=False)

    def _give(self, path: bytes, acls: Acls) -> None:
        for name, value in acls.attributes():
            os.setxattr(self._place + b"/" + path, name, value, follow_symlinks=False)

    def _times(self, path: bytes, status: os.stat_result) -> None:
        os.utime(self._place + b"/" + path, ns=(status.st_mtime_ns, status.st_mtime_ns), follow_symlinks=False)


def attributes(path: bytes | Path) -> dict[str, bytes]:
    """The extended attributes of something in a layer, but those of the overlay: how it lies on what is below, the
    layer itself says. Raises OSError."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENOTSUP:  # a layer in which nothing has any
            raise
        return {}
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names if not name.startswith(_OVERLAY)}


def _bad(why: str) -> UserError:
    return UserError(f"the layer's list of ACLs ({FILE.decode()}): {why}", "the image is damaged, or a trap")
