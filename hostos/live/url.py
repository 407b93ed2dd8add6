"""The address of a server. Apart from the client of it, as the host reads addresses and starts without trio."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from hostos.errors import UserError

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+)*")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Url:
    """Where a server is. `path` has no slash at its end."""

    secure: bool
    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}:{self.port}{self.path}"

    @property
    def loopback(self) -> bool:
        return self.host in _LOOPBACK

    @property
    def authority(self) -> str:
        """For the Host field: the port is left out where everybody expects it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse_url(text: str, example: str = "http://127.0.0.1:8080") -> Url:
    """Reads `http[s]://HOST[:PORT][/PATH]`. Raises UserError, with `example` as the hint."""
    wrong = UserError(f"not the address of a server: {text[:80]!r}", f"write it as {example}")
    if not text.strip().isprintable():  # urlsplit leaves some such letters out
        raise wrong
    try:
        parts = urlsplit(text.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise wrong from None
    path = parts.path.rstrip("/")
    if parts.scheme not in ("http", "https") or parts.query or parts.fragment or "@" in parts.netloc or port == 0:
        raise wrong
    if not _HOST.fullmatch(host) or not _PATH.fullmatch(path) or len(path) > 1024:
        raise wrong
    secure = parts.scheme == "https"
    return Url(secure, host, port or (443 if secure else 80), path)


def parse_gateway(text: str) -> Url:
    """The address of a gateway: `http[s]://HOST[:PORT][/PATH]`. Raises UserError."""
    try:
        return parse_url(text)
    except UserError as error:
        raise UserError(f"--gateway: {error.message}", error.hint) from None
