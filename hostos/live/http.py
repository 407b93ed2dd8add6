"""HTTP/1.1 GET over trio: what a block needs, and nothing that could take for ever or fill the memory.

The guest's Python has no other asynchronous client, and threads cannot be cancelled. No redirects, no
cookies, no compression, no proxies. RFC 9112.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass

import trio

from hostos.live.url import Url

MAX_HEAD = 32 * 1024
"""Most bytes of status line and headers."""
CHUNK = 256 * 1024

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: |\r?$)")


Span = tuple[int, int]
"""Offset and length of a part of a file, bytes."""


class HttpError(Exception):
    """The answer is not one, or there is none. `str()` says why."""


@dataclass(frozen=True)
class Answer:
    """`type`: the media type, lower case, without parameters."""

    status: int
    type: str
    body: bytes


class Connection:
    """A connection to one server, for one request after the other."""

    def __init__(self, url: Url, stream: trio.abc.Stream) -> None:
        self._url, self._stream = url, stream
        self._buffer = bytearray()
        self.fresh = True
        """Nothing has been asked yet."""
        self.reusable = False
        """The last answer was complete, and the server keeps the connection."""

    @classmethod
    async def open(cls, url: Url) -> Connection:
        """Raises HttpError."""
        try:
            tcp = await trio.open_tcp_stream(url.host, url.port)
            tcp.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
            if not url.secure:
                return cls(url, tcp)
            stream = trio.SSLStream(tcp, ssl.create_default_context(), server_hostname=url.host, https_compatible=True)
            try:
                await stream.do_handshake()
            except BaseException:
                await trio.aclose_forcefully(tcp)
                raise
            return cls(url, stream)
        except (OSError, trio.BrokenResourceError) as error:
            raise HttpError(_reason(error)) from None

    async def close(self) -> None:
        self.reusable = False
        await trio.aclose_forcefully(self._stream)

    async def get(self, path: str, accept: str, limit: int, span: Span | None = None) -> Answer:
        """The answer to a GET of `path` (below the URL's own), with at most `limit` bytes. Raises HttpError.

        `span`: only this part of the file (RFC 9110, 14.2); a server that sends all of it, or another part,
        is refused. The caller sets the time limit; a connection that was given up must be closed.
        """
        part = f"Range: bytes={span[0]}-{span[0] + span[1] - 1}\r\n" if span else ""
        request = (
            f"GET {self._url.path}{path} HTTP/1.1\r\nHost: {self._url.authority}\r\n"
            f"Accept: {accept}\r\nAccept-Encoding: identity\r\n{part}User-Agent: hostos\r\n\r\n"
        )
        self.fresh, self.reusable = False, False
        try:
            await self._stream.send_all(request.encode("ascii"))
            return await self._answer(limit, span)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise HttpError(_reason(error)) from None

    async def _answer(self, limit: int, span: Span | None) -> Answer:
        lines = await self._head()
        match = _STATUS.match(lines[0])
        if not match:
            raise HttpError("the answer is not HTTP")
        status = int(match[1])
        if status < 200:
            raise HttpError(f"status {status}")
        fields: dict[str, str] = {}
        for line in lines[1:]:
            name, colon, value = line.decode("latin-1").partition(":")
            key = name.lower()
            if not colon or name != name.strip() or (key in fields and key in ("content-length", "transfer-encoding")):
                raise HttpError("the answer is not HTTP")
            fields[key] = value.strip()
        keep = "close" not in fields.get("connection", "").lower() and lines[0].startswith(b"HTTP/1.1")
        if fields.get("content-encoding", "identity").lower() != "identity":
            raise HttpError("the answer is compressed, which was not asked for")
        if span and status == 200:
            raise HttpError("the server sends whole files only: it knows no ranges")
        if span and status == 206:
            sent = re.match(r"bytes ([0-9]{1,15})-([0-9]{1,15})/", fields.get("content-range", ""))
            if not sent or (int(sent[1]), int(sent[2])) != (span[0], span[0] + span[1] - 1):
                raise HttpError("the server sent another part of the file")
        if "transfer-encoding" in fields:
            if fields["transfer-encoding"].lower() != "chunked" or "content-length" in fields:
                raise HttpError("the answer is in no form that is known")
            body = await self._chunked(limit)
        elif "content-length" in fields:
            length = fields["content-length"]
            if not re.fullmatch(r"[0-9]{1,12}", length):
                raise HttpError("the answer has no length")
            if int(length) > limit:
                raise HttpError(f"the answer has {length} bytes; {limit} are allowed")
            body = await self._exactly(int(length))
        elif status in (204, 304):
            body = b""
        else:
            body, keep = await self._rest(limit), False
        self.reusable = keep and not self._buffer
        return Answer(status, fields.get("content-type", "").partition(";")[0].strip().lower(), body)

    # --- pieces of the answer -----------------------------------------------------------------------

    async def _more(self) -> None:
        data = await self._stream.receive_some(CHUNK)
        if not data:
            raise HttpError("the connection ended in the middle of the answer")
        self._buffer += data

    async def _line(self, limit: int) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > limit:
                raise HttpError("the answer is not HTTP")
            await self._more()
        if end > limit:
            raise HttpError("the answer is not HTTP")
        line = bytes(self._buffer[:end]).removesuffix(b"\r")
        del self._buffer[: end + 1]
        return line

    async def _head(self) -> list[bytes]:
        lines: list[bytes] = []
        left = MAX_HEAD
        while line := await self._line(left):
            lines.append(line)
            left -= len(line) + 2
            if left <= 0:
                raise HttpError("the answer's head is too large")
        if not lines:
            raise HttpError("the answer is not HTTP")
        return lines

    async def _exactly(self, length: int) -> bytes:
        while len(self._buffer) < length:
            await self._more()
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data

    async def _chunked(self, limit: int) -> bytes:
        body = bytearray()
        while True:
            size = (await self._line(4096)).partition(b";")[0].strip()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", size):
                raise HttpError("the answer is not HTTP")
            length = int(size, 16)
            if len(body) + length > limit:
                raise HttpError(f"the answer has more than {limit} bytes")
            if not length:
                break
            body += await self._exactly(length)
            if await self._line(2):
                raise HttpError("the answer is not HTTP")
        left = MAX_HEAD
        while line := await self._line(left):  # trailers, of no interest
            left -= len(line)
            if left <= 0:
                raise HttpError("the answer's end is too large")
        return bytes(body)

    async def _rest(self, limit: int) -> bytes:
        """Up to the end of the connection."""
        while len(self._buffer) <= limit:
            data = await self._stream.receive_some(CHUNK)
            if not data:
                break
            self._buffer += data
        if len(self._buffer) > limit:
            raise HttpError(f"the answer has more than {limit} bytes")
        data = bytes(self._buffer)
        self._buffer.clear()
        return data


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) and error.__cause__ else error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, ssl.SSLError):
        return f"TLS: {cause.reason or cause}"
    if isinstance(cause, OSError) and cause.__cause__ is not None and cause.strerror is None:
        return _reason(cause.__cause__)  # trio's "all attempts to connect failed"
    if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
        return os.strerror(cause.errno)
    return str(cause) or type(cause).__name__
