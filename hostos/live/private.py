"""Private images: layers encrypted block by block, under a key that is in no manifest.

Every sector of 4096 bytes is AES-256 in XTS mode (IEEE 1619), its number in the layer being the tweak: what
dm-crypt calls `aes-xts-plain64` with `sector_size:4096 iv_large_sectors`. Each layer has a key of its own,
expanded from the image's (HKDF, RFC 5869), so that equal sectors of two layers don't look equal.
"""

from __future__ import annotations

import base64
import hmac
import re
from hashlib import sha256

from hostos.errors import UserError

CIPHER = "aes-xts-plain64:4096"
"""What the manifest says of an encrypted layer."""
SECTOR = 4096
KEY_SIZE = 32
"""Bytes of an image's key."""
LAYER_KEY_SIZE = 64
"""Bytes of a layer's: two AES-256 keys."""

_KEY = re.compile(r"[A-Za-z0-9_-]{43}")


def key_to_text(key: bytes) -> str:
    """As it stands in a link or a file: base64url without padding."""
    return base64.urlsafe_b64encode(key).decode().rstrip("=")


def parse_key(text: str) -> bytes:
    """Raises UserError, in which nothing of `text` is repeated."""
    if not _KEY.fullmatch(text.strip()):
        raise UserError("that is no key of a private image", "it has 43 letters; hostos image link prints it after #")
    return base64.urlsafe_b64decode(text.strip() + "=")


def layer_key(key: bytes, number: int) -> bytes:
    """The key of layer `number` (0: the lowest) of the image with this key."""
    made, block = b"", b""
    for counter in range(1, LAYER_KEY_SIZE // sha256().digest_size + 1):
        block = hmac.digest(key, block + b"hostos layer %d" % number + bytes([counter]), sha256)
        made += block
    return made
