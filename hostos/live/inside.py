"""Files of a system that is not the running one, below the directory that will be its root.

Its links are absolute, as `/etc/resolv.conf` -> `/run/systemd/resolve/stub-resolv.conf`: they are followed as
that system would follow them, by the kernel.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from hostos.live import syscalls

MOST = 1 << 20
"""Bytes read of a file at most."""


class Inside:
    """The system below `root`; paths are relative to it. Every method may raise OSError, and block as long as
    the file system does: call from a thread."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Inside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._root)

    def program(self, *paths: str) -> str:
        """The first of these that is a program, "" if none is."""
        for path in paths:
            with suppress(OSError):
                found = syscalls.open_in_root(self._root, path, os.O_PATH)
                try:
                    facts = os.fstat(found)
                finally:
                    os.close(found)
                if stat.S_ISREG(facts.st_mode) and facts.st_mode & 0o111:
                    return path
        return ""

    def read(self, path: str) -> bytes:
        """The content of a file; empty if there is none."""
        try:
            file = syscalls.open_in_root(self._root, path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return b""
        with os.fdopen(file, "rb") as stream:
            return stream.read(MOST) if stat.S_ISREG(os.fstat(file).st_mode) else b""

    def fetch(self, path: str, most: int) -> None:
        """Read a file, the first `most` bytes of it, for the sake of having it here."""
        file = syscalls.open_in_root(self._root, path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(file).st_mode):
                while most > 0 and (data := os.read(file, min(most, MOST))):
                    most -= len(data)
        finally:
            os.close(file)

    def target(self, path: str) -> str:
        """Where a link leads, as it is written; "" if it is none."""
        parent, _, name = path.rpartition("/")
        try:
            directory = syscalls.open_in_root(self._root, parent or ".", os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return ""
        try:
            return os.readlink(name, dir_fd=directory)
        except OSError:
            return ""
        finally:
            os.close(directory)

    def directory(self, path: str, mode: int = 0o755) -> int:
        """A descriptor of a directory, made with `mode` (and its parents 0755) if it is not there."""
        try:
            return syscalls.open_in_root(self._root, path or ".", os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            parent, _, name = path.rpartition("/")
            above = self.directory(parent)
        try:
            os.mkdir(name, 0o755, dir_fd=above)
            os.chmod(name, mode, dir_fd=above)
        finally:
            os.close(above)
        return syscalls.open_in_root(self._root, path, os.O_RDONLY | os.O_DIRECTORY)

    def changed(self, path: str) -> int:
        """When it was modified last, nanoseconds since 1970; 0 if it is not there."""
        try:
            found = syscalls.open_in_root(self._root, path, os.O_PATH)
        except OSError:
            return 0
        try:
            return os.fstat(found).st_mtime_ns
        finally:
            os.close(found)

    def write(self, path: str, content: bytes | str, mode: int = 0o644, *, changed: int | None = None) -> None:
        """A new file in place of what has that name; `changed`: modified then, nanoseconds since 1970."""
        data = content.encode() if isinstance(content, str) else content
        parent, _, name = path.rpartition("/")
        directory = self.directory(parent)
        try:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(name, flags, mode, dir_fd=directory), "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                if changed is not None:
                    file.flush()
                    os.utime(file.fileno(), ns=(changed, changed))
        finally:
            os.close(directory)

    def link(self, path: str, target: str) -> None:
        """A symbolic link in place of what has that name."""
        parent, _, name = path.rpartition("/")
        directory = self.directory(parent)
        try:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            os.symlink(target, name, dir_fd=directory)
        finally:
            os.close(directory)

    def remove(self, path: str) -> None:
        """Remove a file, if there is one."""
        parent, _, name = path.rpartition("/")
        with suppress(FileNotFoundError):
            directory = syscalls.open_in_root(self._root, parent or ".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.unlink(name, dir_fd=directory)
            finally:
                os.close(directory)

    def mount(self, path: str, kind: str, source: str, flags: int = 0, options: str = "") -> None:
        """mount(2) on a directory in there, made if it is missing; `kind` "": `source` again (a bind mount)."""
        place = self.directory(path)
        try:
            # By its descriptor: the kernel would follow the path's links in the wrong root.
            target = Path(f"/proc/self/fd/{place}")
            syscalls.mount(source, target, kind, flags | (0 if kind else syscalls.MS_BIND), options)
        finally:
            os.close(place)
