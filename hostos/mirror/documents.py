"""Small files that are fetched whole, before anything is done with them: what is signed, and signatures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime

import aiohttp

from hostos.mirror.errors import MissingError, UnreachableError
from hostos.mirror.sources import NETWORK_ERRORS

DEADLINE_S = 60.0
"""For the whole of one."""
PATIENCE_S = 20.0
"""Until a mirror answers, and for each pause of it: less than the 30 s after which apt gives up on us."""
SHORT_PATIENCE_S = 5.0
"""The same where there is something else to serve."""


@dataclass(frozen=True)
class Document:
    """`modified`: an HTTP date (RFC 9110, section 5.6.7), as the mirror said it, or empty."""

    body: bytes
    modified: str = ""

    @property
    def modified_at(self) -> float | None:
        return parse_date(self.modified)


def parse_date(text: str) -> float | None:
    """Unix time of an HTTP date, None if it is none."""
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def http_date(when: float | None = None) -> str:
    return formatdate(time.time() if when is None else when, usegmt=True)


@dataclass
class Fetcher:
    session: aiohttp.ClientSession
    proxy: str = ""

    async def get(self, url: str, largest: int, modified: str = "", patience: float = PATIENCE_S) -> Document | None:
        """The document; None if it has not changed since `modified`. `patience`: seconds.

        Raises MissingError (404) or UnreachableError, also for one of more than `largest` bytes.
        """
        headers = {"Accept-Encoding": "identity", "Cache-Control": "max-age=0"}
        if modified:
            headers["If-Modified-Since"] = modified
        timeout = aiohttp.ClientTimeout(DEADLINE_S, sock_connect=min(10.0, patience), sock_read=patience)
        try:
            async with self.session.get(
                url, headers=headers, timeout=timeout, max_redirects=5, proxy=self.proxy or None
            ) as answer:
                if answer.status == 304 and modified:
                    return None
                if answer.status in (404, 410):
                    raise MissingError(f"the mirror has no {url}")
                if answer.status != 200:
                    raise UnreachableError(f"{url}: the mirror says {answer.status} {answer.reason}", 502)
                body = bytearray()
                async for data in answer.content.iter_chunked(1 << 18):
                    body += data
                    if len(body) > largest:
                        raise UnreachableError(f"{url} is larger than such a file can be", 502)
                return Document(bytes(body), answer.headers.get("Last-Modified", ""))
        except NETWORK_ERRORS as error:
            text = str(error) or "no answer in time"
            raise UnreachableError(f"{url}: {text}") from None
