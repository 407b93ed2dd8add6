"""A name's record: which image it means, signed by its owner.

What is signed is spelled as BEP 44 has it for mutable items (salt, sequence number, value), and the value
has BEP 46's `ih` (https://www.bittorrent.org/beps/bep_0044.html, bep_0046.html). The record itself is one
line of JSON, at most 1000 bytes, so that it can be a value in the DHT, a file on a web server, or a mail.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, replace
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hostos.errors import UserError
from hostos.live.torrents import parse_peer

SCHEMA = 1
KIND = "hostos-name"
MAX_RECORD = 1000
"""Bytes: what BEP 44 allows a value to have."""
MAX_SEQUENCE = (1 << 63) - 1
MAX_PEERS = 4
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_HEX = {length: re.compile(rf"[0-9a-f]{{{length}}}") for length in (64, 128)}


def check_name(name: str) -> str:
    """The name itself, if something may be called that: by its owner or in a book. Raises UserError."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"not a usable name: {name[:80]!r}", "use up to 64 of a-z, 0-9, '.', '_', '-', e.g. gaming or debian-13"
        )
    return name


def check_key(text: str) -> str:
    """A public key: 64 hex digits of an ed25519 key. Raises UserError."""
    key = text.strip().lower()
    if not _HEX[64].fullmatch(key):
        raise UserError(f"not a public key: {text[:80]!r}", "64 hex digits: its owner sees them in `hostos name ls`")
    return key


@dataclass(frozen=True)
class Record:
    """`key`: the owner's public key, `image`: the image's hash, both hex; `at`, `expires`: Unix times;
    `peers`: `HOST:PORT` of who has the image. Never trusted before `verified`."""

    key: str
    name: str
    sequence: int
    image: str
    at: int
    expires: int
    peers: tuple[str, ...] = ()
    signature: str = ""

    def value(self) -> bytes:
        """Bencoded, keys sorted."""
        peers = b"".join(_text(peer) for peer in self.peers)
        image = bytes.fromhex(self.image)
        # A v2 hash counts in the DHT by its first 20 bytes (BEP 52).
        parts = (b"2:ati%de" % self.at, b"3:expi%de" % self.expires, b"2:ih" + _text(image[:20]))
        return b"d" + b"".join((*parts, b"5:peersl" + peers + b"e", b"2:v2" + _text(image))) + b"e"

    def signed(self) -> bytes:
        """What the signature is of: BEP 44, "4:salt" … "3:seq" … "1:v" …."""
        return b"4:salt" + _text(self.name) + b"3:seqi%de1:v" % self.sequence + self.value()

    def sign(self, key: Ed25519PrivateKey) -> Record:
        return replace(self, signature=key.sign(self.signed()).hex())

    def verified(self, key: str, name: str) -> Record:
        """The record, if it is `key`'s and of that name. Raises UserError: forged, or of something else."""
        if (self.key, self.name) != (key, name):
            raise UserError(f"a record of {self.name!r} by {self.key[:16]}… instead of {name!r} by {key[:16]}…")
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(self.signature), self.signed())
        except (InvalidSignature, ValueError):
            raise UserError(
                f"a record of {name!r} is not signed by {key[:16]}…: forged or damaged", "it was ignored; ask its owner"
            ) from None
        return self

    @property
    def expired(self) -> bool:
        return self.expires < time.time()

    def to_json(self) -> bytes:
        fields = {**vars(self), "peers": list(self.peers)}
        data = {"schema": SCHEMA, "kind": KIND, **fields}
        text = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
        if len(text) > MAX_RECORD:
            raise UserError(
                f"the record of {self.name} has {len(text)} bytes of at most {MAX_RECORD}", "name fewer peers"
            )
        return text

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Raises UserError for anything that isn't exactly a record. The signature is not checked here."""
        if len(data) > MAX_RECORD + 1:
            raise _bad(f"more than {MAX_RECORD} bytes")
        try:
            value = json.loads(data.decode())
        except (ValueError, RecursionError):
            raise _bad("not JSON") from None
        if not isinstance(value, dict) or value.get("kind") != KIND:
            raise _bad("made by something else")
        if value.get("schema") != SCHEMA:
            raise UserError(f"a name's record has schema {str(value.get('schema'))[:20]}, this hostos knows {SCHEMA}")
        if value.keys() != {"schema", "kind", *cls.__dataclass_fields__}:
            raise _bad("it lacks something, or has too much")
        for name, length in (("key", 64), ("image", 64), ("signature", 128)):
            if not isinstance(value[name], str) or not _HEX[length].fullmatch(value[name]):
                raise _bad(f"its {name} is not {length} hex digits")
        if not isinstance(value["name"], str):
            raise _bad("its name is no text")
        for name in ("sequence", "at", "expires"):
            if type(value[name]) is not int or not 0 <= value[name] <= MAX_SEQUENCE:
                raise _bad(f"its {name} is no number")
        return cls(
            value["key"],
            check_name(value["name"]),
            value["sequence"],
            value["image"],
            value["at"],
            value["expires"],
            _peers(value["peers"]),
            value["signature"],
        )


def _peers(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_PEERS or not all(isinstance(each, str) for each in value):
        raise _bad(f"its peers are not a list of at most {MAX_PEERS}")
    if any(parse_peer(each) != each for each in value):
        raise _bad("a peer is not spelled HOST:PORT")
    return tuple(value)


def _bad(why: str) -> UserError:
    return UserError(f"not the record of a name: {why}")


def _text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return b"%d:%s" % (len(data), data)
