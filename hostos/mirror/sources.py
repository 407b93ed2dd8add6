"""Where a file's bytes come from: the archive's mirror, or a peer. Both speak HTTP with ranges.

A source reads a part of the file and is believed nothing: it may not say another size, nor send less
than was asked for, and what it sends beyond that is not read. Whether the bytes are right is for
`download` to find out.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field

import aiohttp

from hostos.mirror.cluster import Cluster
from hostos.mirror.rate import Rate

MIRROR_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=20)
"""Less than apt waits for us (Acquire::http::Timeout: 30 s)."""
PEER_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=2, sock_read=10)
READ_SIZE = 1 << 18
_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")

NETWORK_ERRORS = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""What aiohttp raises for whatever a network or a server may do."""


class SourceError(Exception):
    """The source can't give this part. `status`: its HTTP status, 0 if there was none; `lied`: it
    claimed what can't be, such as another size."""

    def __init__(self, reason: str, status: int = 0, *, lied: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.lied = lied


@dataclass(eq=False)
class Source:
    """`name`: for the journal, a URL or `peer:HOST:PORT`; `size`: of the whole file, as signed."""

    name: str
    url: str
    size: int
    session: aiohttp.ClientSession
    timeout: aiohttp.ClientTimeout
    rate: Rate
    received: Callable[[int], None]
    headers: Mapping[str, str] = field(default_factory=dict)
    cluster: Cluster | None = None
    proxy: str = ""

    @property
    def is_peer(self) -> bool:
        return self.cluster is not None

    async def read(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """The bytes from `start` up to, not including, `end`. Raises SourceError."""
        if start >= end:
            return
        range_ = f"bytes={start}-{end - 1}" if (start, end) != (0, self.size) else ""
        headers = {"Accept-Encoding": "identity", **self.headers, **({"Range": range_} if range_ else {})}
        if self.cluster is not None:
            path = "/" + self.url.split("/", 3)[3]
            headers.update(self.cluster.sign("GET", path, range_))
        wanted = end - start
        try:
            async with self.session.get(
                self.url,
                headers=headers,
                timeout=self.timeout,
                max_redirects=5,
                allow_redirects=not self.is_peer,
                proxy=self.proxy or None,
            ) as answer:
                skip = self._check(answer, start, end)
                async for data in answer.content.iter_chunked(min(READ_SIZE, self.rate.piece)):
                    await self.rate.take(len(data))
                    self.received(len(data))
                    if skip:
                        skip, data = max(0, skip - len(data)), data[skip:]
                        if not data:
                            continue
                    # What comes after the wanted part is not looked at: an endless answer ends here.
                    data = data[:wanted]
                    wanted -= len(data)
                    yield data
                    if not wanted:
                        return
        except NETWORK_ERRORS as error:
            raise SourceError(f"{type(error).__name__}: {error}".rstrip(": ")) from None
        if wanted:
            raise SourceError(f"sent {wanted} bytes less than it was asked for")

    def _check(self, answer: aiohttp.ClientResponse, start: int, end: int) -> int:
        """How many bytes of the body to leave out. Raises SourceError."""
        if answer.status == 206:
            found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if not found or (int(found[1]), int(found[2])) != (start, end - 1):
                raise SourceError("answers another range than it was asked for", 206)
            if found[3] != "*" and int(found[3]) != self.size:
                raise SourceError(f"says the file has {found[3]} bytes, not {self.size}", 206, lied=True)
            return 0
        if answer.status == 200:
            if answer.content_length is not None and answer.content_length != self.size:
                raise SourceError(f"says the file has {answer.content_length} bytes, not {self.size}", lied=True)
            return start
        raise SourceError(f"{answer.status} {answer.reason}", answer.status)
