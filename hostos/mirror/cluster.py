"""A private cluster: members prove in each request that they hold the common key.

    Authorization: Hostos time=<Unix time>, nonce=<32 hex digits>, mac=<64 hex digits>

The MAC is HMAC-SHA256 (RFC 2104) over method, path, Range header, time and nonce, a line each. It tells
who may ask. What is answered needs no such thing, as it is checked against a signed hash; nor is it
hidden from who can read the wire: packages are public.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass, field

SKEW_S = 300.0
MAX_NONCES = 100_000
_HEADER = re.compile(r"Hostos time=([0-9]{1,12}), nonce=([0-9a-f]{32}), mac=([0-9a-f]{64})")


@dataclass
class Cluster:
    """`key`: empty for the open cluster, where everybody may ask."""

    key: bytes = b""
    _seen: dict[str, float] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        """By which members tell each other on the local network; says nothing about the key."""
        return hmac.new(self.key, b"hostos mirror cluster", hashlib.sha256).hexdigest()[:16] if self.key else "open"

    def swarm_key(self, sha256: str) -> bytes:
        """20 bytes under which who has the file is found in a DHT (BEP 5 takes info-hashes of that size)."""
        text = b"hostos mirror file\0" + bytes.fromhex(sha256)
        return hmac.new(self.key, text, hashlib.sha256).digest()[:20]

    def sign(self, method: str, path: str, range_: str) -> dict[str, str]:
        """The headers of a request."""
        if not self.key:
            return {}
        now, nonce = str(int(time.time())), secrets.token_hex(16)
        mac = self._mac(method, path, range_, now, nonce)
        return {"Authorization": f"Hostos time={now}, nonce={nonce}, mac={mac}"}

    def admits(self, method: str, path: str, range_: str, authorization: str) -> bool:
        """May this request be answered? Each one only once."""
        if not self.key:
            return True
        found = _HEADER.fullmatch(authorization)
        if not found:
            return False
        when, nonce, mac = found.groups()
        if not hmac.compare_digest(mac, self._mac(method, path, range_, when, nonce)):
            return False
        now = time.time()
        if abs(now - int(when)) > SKEW_S or nonce in self._seen:
            return False
        if len(self._seen) >= MAX_NONCES:
            self._seen = {old: at for old, at in self._seen.items() if now - at < 2 * SKEW_S}
        self._seen[nonce] = now
        return True

    def _mac(self, *parts: str) -> str:
        return hmac.new(self.key, "\n".join(parts).encode(), hashlib.sha256).hexdigest()
