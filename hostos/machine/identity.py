"""Who a machine is: its keys, made once by the host, and the archive that takes them inside.

The host makes the guest's SSH host key, so it knows it before the first contact, and a control key
of its own, so that a passphrase on the user's key is never in the way.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostos import cpio
from hostos.errors import UserError
from hostos.machine.files import write_atomic
from hostos.machine.kernel_command import encode_key
from hostos.machine.keys import parse_public_keys
from hostos.paths import private_dir, state_dir

INSIDE = "etc/hostos/instance"


@dataclass(frozen=True)
class KeyPair:
    """`private` in OpenSSH's format, without passphrase; `line` is the public half."""

    private: Path
    line: str


@dataclass(frozen=True)
class Identity:
    """The keys of one machine. `known_hosts` pins the host key under the name `alias`."""

    control: KeyPair
    host: KeyPair
    known_hosts: Path
    alias: str


def ensure_identity(directory: Path, name: str) -> Identity:
    """The identity kept in `directory`, made if it is not there (or not whole)."""
    private_dir(directory)
    alias = f"hostos-{name}"
    control = ensure_key_pair(directory / "control_ed25519", f"hostos-control-{name}")
    host = ensure_key_pair(directory / "ssh_host_ed25519", alias)
    known_hosts = directory / "known_hosts"
    pinned = f"{alias} {' '.join(host.line.split()[:2])}\n".encode()
    if not known_hosts.is_file() or known_hosts.read_bytes() != pinned:
        write_atomic(known_hosts, pinned, 0o644)
    return Identity(control, host, known_hosts, alias)


def user_key_pair() -> KeyPair:
    """The key pair for those who give none: made once, for all machines."""
    return ensure_key_pair(private_dir(_user_key().parent) / _user_key().name, "hostos")


def existing_user_key() -> str | None:
    """The public half of `user_key_pair` if it has been made."""
    return _whole_pair(_user_key())


def _user_key() -> Path:
    return state_dir() / "keys" / "id_ed25519"


def ensure_key_pair(private: Path, comment: str) -> KeyPair:
    """The ed25519 pair `private` and `private`.pub, made anew if either is missing or damaged.

    The public half is removed first and written last: if it is there, the pair is whole.
    """
    whole = _whole_pair(private)
    if whole:
        return KeyPair(private, whole)

    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    shown = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    line = f"{shown.decode()} {comment}"
    public = _public_half(private)
    public.unlink(missing_ok=True)
    write_atomic(private, secret)
    write_atomic(public, line.encode() + b"\n", 0o644)
    return KeyPair(private, line)


def _public_half(private: Path) -> Path:
    return private.with_name(private.name + ".pub")


def _whole_pair(private: Path) -> str | None:
    """The public line of the pair `private`, None if it is not there or damaged."""
    public = _public_half(private)
    try:
        line = parse_public_keys(public.read_bytes(), source=public)[0].line
        whole = private.read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----\n")
    except (FileNotFoundError, UserError):
        return None
    return line if whole else None


def instance_archive(
    identity: Identity,
    hostname: str,
    key_lines: Sequence[str],
    devices: str = "",
    more: Mapping[str, bytes] | None = None,
) -> bytes:
    """The cpio archive the kernel unpacks over the OS: host key, authorized keys, hostname, and what it
    is to mount (`hostos.machine.devices`); `more`: further files.

    The control key comes first among the authorized keys.
    """
    mounts = [cpio.file(f"{INSIDE}/devices", devices.encode(errors="surrogateescape"))] if devices else []
    authorized = "".join(f"{line}\n" for line in (identity.control.line, *key_lines))
    out = io.BytesIO()
    cpio.write_newc(
        [
            cpio.directory("etc"),
            cpio.directory("etc/hostos"),
            cpio.directory(INSIDE, 0o700),
            *mounts,
            *(cpio.file(f"{INSIDE}/{name}", content, 0o600) for name, content in (more or {}).items()),
            cpio.file(f"{INSIDE}/authorized_keys", authorized.encode(), 0o600),
            # Which keys of the command line are among them, so that the guest need not decode those.
            cpio.file(f"{INSIDE}/encoded_keys", "".join(f"{encode_key(line)}\n" for line in key_lines).encode()),
            cpio.file(f"{INSIDE}/hostname", f"{hostname}\n".encode()),
            cpio.file(f"{INSIDE}/ssh_host_ed25519_key", identity.host.private.read_bytes(), 0o600),
            cpio.file(f"{INSIDE}/ssh_host_ed25519_key.pub", f"{identity.host.line}\n".encode()),
        ],
        out,
    )
    return out.getvalue()


def combine_initrd(os_initrd: Path, archive: bytes, target: Path) -> None:
    """Write `os_initrd` followed by `archive` to `target`; the kernel unpacks both.

    Between them stand at least four zero bytes up to a multiple of four: the kernel's lz4
    decompressor takes anything else after its last block for another block
    (lib/decompress_unlz4.c), and an uncompressed archive is only looked for at such an offset
    (init/initramfs.c). Raises OSError.
    """
    import shutil

    temporary = target.with_name(f".{target.name}.part")
    temporary.unlink(missing_ok=True)
    temporary.touch(0o600)
    # Not by way of this process: 0.02 s less for 70 MB.
    shutil.copyfile(os_initrd, temporary)
    with temporary.open("ab") as out:
        out.write(bytes(4 + -out.tell() % 4))
        out.write(archive)
    temporary.replace(target)
