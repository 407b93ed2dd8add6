"""What a client asks for: an HTTP request target becomes `host[:port]/path`, or is refused.

Clients of a proxy send the absolute form (`GET http://deb.example.org/debian/…`); without a proxy in
their configuration they may put the host first in the path (`GET /deb.example.org/debian/…`).
RFC 9112, section 3.2.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote_to_bytes

from hostos.mirror.errors import RefusedError

MAX_TARGET = 4096
_UNUSED = re.compile(r"[\x00-\x20\\\x7f]")
_TARGET = re.compile(r"[!-~]+")
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?(:[0-9]{1,5})?|\[[0-9a-f:.]+\](:[0-9]{1,5})?")
_DEFAULT_PORT = {"http": ":80", "https": ":443"}


def parse_target(target: str) -> str:
    """The `host[:port]/path` that a request target means. Raises RefusedError (400)."""
    if len(target) > MAX_TARGET or not _TARGET.fullmatch(target) or "#" in target:
        raise RefusedError(400, "not a request target")
    if "?" in target:
        raise RefusedError(400, "a package archive takes no queries")
    scheme, separator, rest = target.partition("://")
    if separator and "/" not in scheme:
        if scheme.lower() not in _DEFAULT_PORT:
            raise RefusedError(400, f"no scheme of a package archive: {scheme[:20]}")
        return canonical(scheme.lower(), rest)
    if not target.startswith("/"):
        raise RefusedError(400, "not a request target")
    return canonical("http", target.lstrip("/"))


def canonical(scheme: str, rest: str) -> str:
    """`rest`: `host[:port]/path`, as in a URL. Raises RefusedError (400)."""
    authority, _, path = rest.partition("/")
    authority = authority.rpartition("@")[2].lower().removesuffix(_DEFAULT_PORT[scheme])
    if not _HOST.fullmatch(authority):
        raise RefusedError(400, "no host in the request")
    return f"{authority}/{clean_path(unquote_to_bytes(path))}"


def clean_path(path: bytes) -> str:
    """A relative path without `.` and empty components. Raises RefusedError for one that climbs or has
    characters that no archive uses."""
    try:
        text = path.decode()
    except UnicodeDecodeError:
        raise RefusedError(400, "a path that is not UTF-8") from None
    if _UNUSED.search(text):
        raise RefusedError(400, "a path with characters that no archive uses")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise RefusedError(400, "a path that climbs")
    return "/".join(parts)


def to_url(base: str, relative: str) -> str:
    """The URL of `relative` (a clean path) below the URL `base`."""
    return f"{base}/{quote(relative, safe='/~+:@!$&,;=()*')}"
