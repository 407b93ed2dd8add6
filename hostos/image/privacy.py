"""Makes private images (`hostos.live.private` says what that is), and keeps their keys.

Keys lie in the state directory, not in the store: what is seeded, exported or served never has them.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hostos.errors import UserError
from hostos.image.layers import torrents
from hostos.image.store import Store, StoredImage
from hostos.live.private import CIPHER, KEY_SIZE, SECTOR, key_to_text, layer_key, parse_key
from hostos.live.torrents import TRACE_FILE, make_layer_torrent
from hostos.paths import private_dir, state_dir
from hostos.steps import Steps

_BATCH = 1 << 20


def encrypt(store: Store, image: StoredImage, steps: Steps) -> str:
    """A private image with the content of `image`, under a new random key; its hash. `image` stays.

    Raises UserError: layers are missing, or it is private already.
    """
    if any(layer.cipher for layer in image.manifest.layers):
        raise UserError(f"image {image.name} is private already", "hostos image link prints how to get it")
    key = secrets.token_bytes(KEY_SIZE)
    found, layers = [], []
    with store.incoming() as temporary:
        for number, ((torrent, path), layer) in enumerate(
            zip(torrents(store, image), image.manifest.layers, strict=True)
        ):
            file = temporary / f"layer{number}"
            with steps.step("encrypt") as step:
                encrypt_file(path, file, layer_key(key, number))
                made = make_layer_torrent(file, piece_size=torrent.piece_size)
                step.detail = f"{made.size >> 20} MiB"
            found.append((made, file))
            layers.append(replace(layer, torrent=made.info_hash, size=made.size, file=made.name, cipher=CIPHER))
        # Offsets stay what they are, so the boot trace holds.
        trace = store.bundle(image.hash).files.get(TRACE_FILE)
        # Before the image: one without its key would be of no use to anybody.
        pending = _place("pending")
        _write(pending, key)
        added = store.add(replace(image.manifest, layers=tuple(layers)), found, trace)
        pending.replace(_place(added))
    return added


def encrypt_file(source: Path, target: Path, key: bytes) -> None:
    """Write `source`, filled up with zeros to whole sectors, encrypted into `target`."""
    cipher = algorithms.AES(key)
    number = 0
    with source.open("rb") as plain, target.open("wb") as secret:
        while data := plain.read(_BATCH):
            data += bytes(-len(data) % SECTOR)
            for start in range(0, len(data), SECTOR):
                encryptor = Cipher(cipher, modes.XTS(number.to_bytes(16, "little"))).encryptor()
                secret.write(encryptor.update(data[start : start + SECTOR]) + encryptor.finalize())
                number += 1


def key_of(image: str) -> bytes | None:
    """The key of the image with this hash, if this host has it."""
    try:
        return parse_key(_place(image).read_text())
    except (OSError, UserError):
        return None


def forget(image: str) -> None:
    """Remove its key."""
    _place(image).unlink(missing_ok=True)


def _place(image: str) -> Path:
    return state_dir() / "keys" / image


def _write(path: Path, key: bytes) -> None:
    private_dir(path.parent)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key_to_text(key) + "\n")
        file.flush()
        os.fsync(file.fileno())
