"""Mount system calls that Python does not have, by ctypes.

Made directly rather than through mount(8): each program started costs tens of milliseconds in an
emulated guest, the errors stay distinguishable, and id-mapped mounts need mount_setattr(2), which
mount(8) has only since util-linux 2.39. Numbers and structures: the kernel's uapi headers; the
numbers from 424 on are the same on every architecture.

Every call may block for as long as the file systems below it do: call from a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME, MS_BIND = 1, 2, 4, 8, 1024, 4096
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8

_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_OPENAT2, _SYS_MOUNT_SETATTR = 428, 429, 437, 442
_RESOLVE_IN_ROOT = 0x10
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_IDMAP = 0x00100000
_CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE, _LOOP_CLR_FD = 0x4C82, 0x4C0A, 0x4C01
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR, _LO_FLAGS_DIRECT_IO = 1, 4, 16

IDS = 65536
"""Users and groups of a container."""


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return result


def mount(source: str, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            kind.encode(),
            ctypes.c_ulong(flags),
            options.encode() or None,
        ),
        str(target),
    )


def unmount(target: Path, flags: int = UMOUNT_NOFOLLOW) -> None:
    """umount2(2). Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), flags), str(target))


def unmount_patiently(target: Path, seconds: float = 5.0) -> None:
    """Unmount, waiting for the last user to go; then detach, so that it vanishes in any case.

    Something that is no mount (any more) is fine.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return unmount(target)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return None
            if error.errno != errno.EBUSY or time.monotonic() > end:
                break
        time.sleep(0.02)
    with contextlib.suppress(OSError):
        unmount(target, MNT_DETACH | UMOUNT_NOFOLLOW)
    return None


def open_in_root(root: int, path: str, flags: int) -> int:
    """A descriptor of `path` below the directory `root`, followed as by a process whose root that is
    (openat2(2), RESOLVE_IN_ROOT): neither `..` nor a link leads out of it. Creates nothing. Raises OSError."""
    # struct open_how: flags, mode, resolve
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT)
    return _check(_libc.syscall(_SYS_OPENAT2, root, os.fsencode(path), how, ctypes.c_size_t(len(how))), path)


@contextlib.contextmanager
def namespace(kind: int, name: str) -> Iterator[int]:
    """A process in a new namespace of `kind` (CLONE_NEW…), there for the body: its pid.

    It makes nothing but system calls. Raises OSError; `name` tells what could not be made.
    """
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    child = os.fork()
    if child == 0:
        ok = _libc.unshare(kind) == 0
        os.close(done_write)
        os.write(ready_write, b"1" if ok else b"0")
        os.read(done_read, 1)
        os._exit(0)
    try:
        os.close(ready_write)
        if os.read(ready_read, 1) != b"1":
            raise OSError(errno.EPERM, f"{name} cannot be created (kernel configuration, limits)")
        yield child
    finally:
        for end in (ready_read, done_read, done_write):
            os.close(end)
        os.waitpid(child, 0)


@contextlib.contextmanager
def inside(network: Path) -> Iterator[None]:
    """The calling thread is in another network namespace, given by its file, for the body: a socket stays in
    the namespace in which it was made. Nothing else may run on the thread meanwhile. Raises OSError."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _opened(str(network), os.O_RDONLY) as there:
            _check(_libc.setns(there, CLONE_NEWNET), "setns")
        try:
            yield
        finally:
            _check(_libc.setns(own, CLONE_NEWNET), "setns")
    finally:
        os.close(own)


def tcp_socket_in(network: Path) -> socket.socket:
    """A TCP socket (IPv4) in another network namespace, given by its file. Raises OSError."""
    with inside(network):
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def user_namespace(base: int) -> int:
    """Descriptor of a user namespace that maps 0…65535 to `base`…; the caller closes it."""
    with namespace(_CLONE_NEWUSER, "user namespaces") as child:
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{name}").write_text(f"0 {base} {IDS}\n")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def mount_idmapped(source: Path, target: Path, namespace: int) -> None:
    """Show the mount `source` at `target` with its owners shifted as `namespace` maps them.

    Raises OSError; EINVAL means that the file system's driver can't (squashfs can since Linux 6.2).
    """
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC
    tree = _check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), flags), str(source))
    try:
        _set_idmap(tree, source, namespace)
        _check(
            _libc.syscall(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH),
            str(target),
        )
    finally:
        os.close(tree)


def can_idmap(path: Path, namespace: int) -> bool:
    """Whether the file system of `path` can be shown with shifted owners (rootfs and 9p can't)."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC
    tree = _check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags), str(path))
    try:
        _set_idmap(tree, path, namespace)
    except OSError:
        return False
    finally:
        os.close(tree)
    return True


def _set_idmap(tree: int, source: Path, namespace: int) -> None:
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    attributes = struct.pack("QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, namespace)
    size = ctypes.c_size_t(len(attributes))
    result = _libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, size)
    _check(result, f"id-mapping {source}")


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def attach_loop(path: Path, *, direct: bool = False) -> tuple[str, int]:
    """A read-only loop device over a file: its name, and a descriptor that keeps it.

    `direct`: the file is read past the page cache, so without read-ahead.

    The device goes by itself when the descriptor is closed and nothing is mounted from it.
    """
    with _opened(str(path), os.O_RDONLY) as backing, _opened("/dev/loop-control", os.O_RDWR) as control:
        flags = _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_DIRECT_IO if direct else 0)
        for _ in range(64):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            name = f"/dev/loop{number}"
            _make_node(name, number)
            device = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            # struct loop_config: fd, block_size, struct loop_info64 (lo_flags at 52), reserved
            information = bytearray(232)
            struct.pack_into("I", information, 52, flags)
            config = struct.pack("II", backing, 0) + bytes(information) + bytes(64)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                return name, device
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # somebody else took it between the two calls
                    raise
        raise OSError(errno.EBUSY, "no loop device could be had")


def _make_node(name: str, number: int) -> None:
    """devtmpfs makes the node; where /dev is something else, it has to be made."""
    with contextlib.suppress(FileExistsError):
        os.mknod(name, 0o600 | 0o060000, os.makedev(7, number))
