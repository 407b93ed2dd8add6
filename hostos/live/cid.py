"""Content identifiers (CIDs) of IPFS: which bytes a block has.

CIDv0 is the bare SHA-256 multihash of a dag-pb block in base58 (`Qm…`); CIDv1 says version, codec and
multihash, in one of several alphabets (`bafy…`). https://github.com/multiformats/cid

Only what can be verified safely is accepted: SHA-256, and the identity hash for a few bytes that stand
in the CID itself; blocks that are dag-pb or raw bytes.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from dataclasses import dataclass
from hashlib import sha256

from hostos.errors import UserError

RAW, DAG_PB = 0x55, 0x70
"""Codecs: plain bytes; the tree nodes of UnixFS. https://github.com/multiformats/multicodec"""
IDENTITY, SHA2_256 = 0x00, 0x12
CODECS = {RAW: "raw", DAG_PB: "dag-pb"}

MAX_IDENTITY = 128
"""Most bytes a CID may hold itself (the limit of go-ipfs and Kubo)."""
MAX_TEXT = 512

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"
_V0 = re.compile(r"Qm[1-9A-HJ-NP-Za-km-z]{44}")
_V1 = re.compile(r"b[a-z2-7]{8,}|B[A-Z2-7]{8,}|z[1-9A-HJ-NP-Za-km-z]{8,}|k[0-9a-z]{8,}|f01[0-9a-f]{8,}|F01[0-9A-F]{8,}")

_HEX = re.compile(r"[0-9a-fA-F]+")

_NAMES = {0x11: "SHA-1", 0x13: "SHA-512", 0x1E: "BLAKE3", 0xD5: "MD5", 0xB220: "BLAKE2b-256"}
_OTHER_CODECS = {
    0x71: "dag-cbor",
    0x72: "libp2p-key (an IPNS name)",
    0x0129: "dag-json",
    0x78: "git-raw",
    0x0200: "json",
}


@dataclass(frozen=True)
class Cid:
    """A CID that can be verified. However it was written, the CIDs of one block are equal."""

    codec: int
    hash: int
    digest: bytes

    def __str__(self) -> str:
        """CIDv1 in lower-case base32, however it was written."""
        return _text(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The binary CIDv1."""
        return b"".join((b"\x01", varint(self.codec), varint(self.hash), varint(len(self.digest)), self.digest))

    @property
    def inline(self) -> bytes | None:
        """The block, if the CID holds it itself."""
        return self.digest if self.hash == IDENTITY else None

    def matches(self, data: bytes) -> bool:
        """Whether these are the bytes it stands for."""
        if self.hash == IDENTITY:
            return data == self.digest
        return sha256(data).digest() == self.digest


@functools.lru_cache(maxsize=1024)
def _text(binary: bytes) -> str:
    return "b" + base64.b32encode(binary).decode().rstrip("=").lower()


def of_block(data: bytes, codec: int) -> Cid:
    """The CID of a block."""
    return Cid(codec, SHA2_256, sha256(data).digest())


def looks_like_cid(text: str) -> bool:
    """Whether somebody who wrote this meant a CID, right or wrong: not a hex hash, nor an image's name."""
    text = _bare(text).partition("/")[0]
    if _V0.fullmatch(text):
        return True
    # The first byte is the version, 1.
    if not _V1.fullmatch(text) or len(text) < 40:
        return False
    if text[0] in "bB" and _HEX.fullmatch(text):
        return False  # the beginning of an info-hash
    return text[:2].lower() in ("ba", "f0") if text[0] in "bBfF" else _decode(text)[:1] == b"\x01"


def parse(text: str) -> Cid:
    """Reads CIDv0 and CIDv1, also with `ipfs://` or `/ipfs/` before. Raises UserError."""
    bare = _bare(text.strip())
    if "/" in bare:
        raise UserError(
            f"not a CID: {text[:100]!r} names something within it",
            "give the CID of the image itself: ipfs resolve -r /ipfs/CID/PATH",
        )
    if len(bare) > MAX_TEXT:
        raise UserError(f"not a CID: {len(bare)} characters", "a CID has about 60")
    try:
        if _V0.fullmatch(bare):
            return _multihash(DAG_PB, _base_n(bare, _BASE58), "CIDv0")
        if _V1.fullmatch(bare):
            return from_bytes(_decode(bare))
    except ValueError as error:
        raise UserError(f"not a CID that can be used: {text[:80]!r}: {error}", "copy all of it") from None
    raise UserError(f"not a CID: {text[:80]!r}", "a CID begins with bafy, bafk or Qm")


def from_bytes(data: bytes) -> Cid:
    """Reads a binary CID as it stands in a dag-pb link. Raises ValueError on anything else."""
    if len(data) == 34 and data[:2] == b"\x12\x20":
        return _multihash(DAG_PB, data, "CIDv0")
    version, rest = read_varint(data, 0)
    if version != 1:
        raise ValueError(f"CID version {version}")
    codec, rest = read_varint(data, rest)
    if codec not in CODECS:
        name = _OTHER_CODECS.get(codec, f"codec 0x{codec:x}")
        raise ValueError(f"it is {name}; UnixFS is made of dag-pb and raw blocks")
    return _multihash(codec, data[rest:], "CIDv1")


def _multihash(codec: int, data: bytes, what: str) -> Cid:
    kind, at = read_varint(data, 0)
    length, at = read_varint(data, at)
    digest = data[at:]
    if len(digest) != length:
        raise ValueError(f"{what} with a hash of the wrong length")
    if kind == SHA2_256:
        if length != 32:
            raise ValueError(f"{what} with a shortened hash")
    elif kind == IDENTITY:
        if length > MAX_IDENTITY:
            raise ValueError(f"{what} that holds {length} bytes itself; {MAX_IDENTITY} are allowed")
    else:
        raise ValueError(f"its hash is {_NAMES.get(kind, f'0x{kind:x}')}; SHA-256 is required")
    return Cid(codec, kind, digest)


def varint(value: int) -> bytes:
    """Unsigned LEB128, as multiformats and protobuf have it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, at: int, limit: int = 10) -> tuple[int, int]:
    """A number and where the next byte is. Raises ValueError: cut off, or of more than `limit` bytes."""
    value = 0
    for index in range(limit):
        if at + index >= len(data):
            raise ValueError("cut off")
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if value >= 1 << 64:
                raise ValueError("a number is too large")
            return value, at + index + 1
    raise ValueError("a number is too long")


def _bare(text: str) -> str:
    text = text.strip()
    for prefix in ("ipfs://", "/ipfs/"):
        text = text.removeprefix(prefix)
    return text.rstrip("/")


def _decode(text: str) -> bytes:
    """Multibase: the first character names the alphabet."""
    base, body = text[0], text[1:]
    if base in "bB":
        try:
            data = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
        except binascii.Error:
            raise ValueError("not base32") from None
        if base64.b32encode(data).decode().rstrip("=") != body.upper():
            raise ValueError("not base32: bits are left over")
        return data
    if base in "fF":
        try:
            return bytes.fromhex(body)
        except ValueError:
            raise ValueError("not base16") from None
    return _base_n(body, _BASE58 if base == "z" else _BASE36)


def _base_n(text: str, alphabet: str) -> bytes:
    value = 0
    for letter in text:
        value = value * len(alphabet) + alphabet.index(letter)
    zeros = len(text) - len(text.lstrip(alphabet[0]))
    return b"\0" * zeros + value.to_bytes((value.bit_length() + 7) // 8, "big")
