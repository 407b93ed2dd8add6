"""A signed Release file: when it was made, how long it holds, and the files it vouches for.

Format: https://wiki.debian.org/DebianRepository/Format#A.22Release.22_files
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from debian.deb822 import Release as Deb822Release

from hostos.mirror.errors import RefusedError, UnverifiedError
from hostos.mirror.location import clean_path

MAX_SIZE = 16 << 20
FUTURE_S = 10.0
"""apt's Acquire::Max-FutureTime: how far a Release may be ahead of this clock."""
_SHA256, _SHA512 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True)
class Listed:
    """A file below the Release file's directory. `size` in bytes."""

    path: str
    size: int
    sha256: str
    sha512: str = ""


@dataclass(frozen=True)
class Release:
    """`date`, `valid_until`: Unix time (None: it never expires)."""

    date: float
    valid_until: float | None
    components: tuple[str, ...]
    files: tuple[Listed, ...]


def parse(text: bytes, what: str) -> Release:
    """Raises UnverifiedError for a file that a signature covers and which still can't be used."""
    try:
        fields = Deb822Release(text.decode())
        date = parsedate_to_datetime(fields["Date"]).timestamp()
        until = fields.get("Valid-Until")
        valid_until = parsedate_to_datetime(until).timestamp() if until else None
    except (KeyError, ValueError, TypeError):
        raise UnverifiedError(f"{what} has no Date, or none that can be read") from None
    strong = {
        str(item["name"]): str(item["sha512"])
        for item in fields.get("SHA512", ())
        if _SHA512.fullmatch(str(item["sha512"]))
    }
    files = []
    for item in fields.get("SHA256", ()):
        name, digest, size = str(item["name"]), str(item["sha256"]).lower(), str(item["size"])
        if not _SHA256.fullmatch(digest) or not (size.isascii() and size.isdigit()):
            continue
        try:
            files.append(Listed(clean_path(name.encode()), int(size), digest, strong.get(name, "")))
        except RefusedError:
            continue
    if not files and fields.get("MD5Sum"):
        raise UnverifiedError(f"{what} lists no SHA-256")
    return Release(date, valid_until, tuple(str(fields.get("Components", "")).split()), tuple(files))


def check_time(
    release: Release, what: str, *, check_valid_until: bool = True, check_date: bool = True, now: float | None = None
) -> None:
    """Raises UnverifiedError for a Release that has expired, or comes from the future."""
    now = time.time() if now is None else now
    if check_valid_until and release.valid_until is not None and now > release.valid_until:
        raise UnverifiedError(f"{what} has expired ({_age(now - release.valid_until)} ago)")
    if check_date and release.date > now + FUTURE_S:
        raise UnverifiedError(f"{what} is not valid yet (for {_age(release.date - now)})")


def _age(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days" if seconds > 2 * 86400 else f"{seconds / 60:.0f} min"
