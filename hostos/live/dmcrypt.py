"""A device whose content is another's, decrypted by the kernel (dm-crypt).

By device-mapper's own ioctls (linux/dm-ioctl.h, Documentation/admin-guide/device-mapper/dm-crypt.rst): the guest
has no dmsetup. The key goes through the kernel's keyring, so that no table shows it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hostos.errors import failure
from hostos.live.private import SECTOR

CONTROL = Path("/dev/mapper/control")
_HEADER = struct.Struct("<3I I I I i I I 4x Q 128s 129s 7x")
_TARGET = struct.Struct("<Q Q i I 16s")
_VERSION = (4, 0, 0)
_CREATE, _REMOVE, _SUSPEND, _LOAD = 3, 4, 6, 9
_READ_ONLY, _SECURE_DATA, _DEFERRED = 1 << 0, 1 << 15, 1 << 17
_THREAD_KEYRING = -1
_REVOKE = 3
# add_key(2) and keyctl(2) have no wrapper in the C library.
_NUMBERS = {"x86_64": (248, 250), "aarch64": (217, 219)}
assert _HEADER.size == 312
assert _TARGET.size == 40


def _ioctl(control: int, number: int, name: str, flags: int = 0, table: bytes = b"") -> int:
    """One request about the device `name`; the number of the device. Raises OSError."""
    data = bytearray(_HEADER.pack(*_VERSION, _HEADER.size + len(table), _HEADER.size, int(bool(table)), 0, flags,
                                  0, 0, name.encode(), b"") + table)  # fmt: skip
    # _IOWR(0xfd, number, struct dm_ioctl)
    fcntl.ioctl(control, 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | number, data, True)
    device: int = _HEADER.unpack_from(data)[9]
    return device


def target(device: str, sectors: int, key_name: str) -> bytes:
    """The table of one line: `sectors` (of 512 bytes) of `device`, with the logon key called `key_name`."""
    words = f"aes-xts-plain64 :64:logon:{key_name} 0 {device} 0 2 sector_size:{SECTOR} iv_large_sectors"
    parameters = words.encode() + b"\0"
    parameters += bytes(-len(parameters) % 8)
    return _TARGET.pack(0, sectors, 0, _TARGET.size + len(parameters), b"crypt") + parameters


@contextmanager
def _logon_key(name: str, key: bytes) -> Iterator[None]:
    """The key in this thread's keyring, as long as the context. A logon key can't be read back."""
    add_key, keyctl = _NUMBERS[os.uname().machine]
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    serial = call(
        add_key, b"logon", name.encode(), key, ctypes.c_size_t(len(key)), ctypes.c_int(_THREAD_KEYRING)
    )  # fmt: skip
    if serial < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"the kernel's keyring: {os.strerror(number)}")
    try:
        yield
    finally:
        call(keyctl, ctypes.c_long(_REVOKE), ctypes.c_long(serial))


@contextmanager
def opened(device: str, size: int, key: bytes) -> Iterator[Path]:
    """The decrypted device of `size` bytes over `device`. It is gone with its last user after the context.

    Must begin and end in the same thread. Raises OSError, or a failure if the kernel has no dm-crypt.
    """
    token = secrets.token_hex(8)
    name, key_name = f"hostos-{token}", f"hostos:{token}"
    try:
        control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise failure("a private image needs a kernel with dm-crypt, which this one has not") from None
    try:
        number = _ioctl(control, _CREATE, name)
        try:
            with _logon_key(key_name, key):
                try:
                    _ioctl(control, _LOAD, name, _READ_ONLY | _SECURE_DATA, target(device, size // 512, key_name))
                except OSError as error:
                    if error.errno == errno.EINVAL:
                        raise failure("the kernel has no AES-XTS for dm-crypt, which a private image needs") from None
                    raise
            _ioctl(control, _SUSPEND, name)  # without the flag it resumes
            yield Path(f"/dev/dm-{number & 0xFF | number >> 12 & 0xFFF00}")
        finally:
            with suppress(OSError):
                _ioctl(control, _REMOVE, name, _DEFERRED)
    finally:
        os.close(control)
