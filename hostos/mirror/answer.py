"""HTTP answers: a verified file, a file on its way, a small document; ranges and conditions.

RFC 9110: conditional requests (section 13), range requests (section 14). A strong ETag, the file's
SHA-256, makes both exact.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from hostos.mirror.documents import Document, http_date, parse_date
from hostos.mirror.download import Download, RestartedError
from hostos.mirror.errors import RefusedError
from hostos.mirror.rate import Rate

CHUNK = 1 << 20
SERVER = "hostos-mirror"
_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})")
_TYPES = {
    ".deb": "application/vnd.debian.binary-package", ".gz": "application/gzip", ".xz": "application/x-xz",
    ".zst": "application/zstd", ".sig": "application/pgp-signature", ".gpg": "application/pgp-signature",
}  # fmt: skip

Sent = Callable[[int], None]


def content_type(location: str) -> str:
    return _TYPES.get(Path(location).suffix, "application/octet-stream")


def refused(request: web.BaseRequest, error: RefusedError) -> web.Response:
    """The reason stands in the status line, too: it is what apt shows."""
    reason = re.sub(r"[^ -~]", "?", error.reason)
    response = web.Response(
        status=error.status, reason=reason[:300], text=f"{error.reason}\n", headers={"Server": SERVER}
    )
    if error.status in (400, 405):
        response.force_close()
    return response


async def document(request: web.BaseRequest, found: Document, sent: Sent) -> web.Response:
    """A small verified file, conditionally."""
    headers = {"Server": SERVER, "Cache-Control": "max-age=0"}
    if found.modified:
        headers["Last-Modified"] = found.modified
    since = parse_date(request.headers.get("If-Modified-Since", ""))
    modified = found.modified_at
    if since is not None and modified is not None and modified <= since:
        return web.Response(status=304, headers=headers)
    sent(len(found.body) if request.method == "GET" else 0)
    return web.Response(body=found.body, headers=headers, content_type="application/octet-stream")


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """(start, end) of a Range header for a file of `size` bytes; None to send all of it, as for several
    ranges, which RFC 9110 allows a server to ignore. Raises RefusedError (416)."""
    if not text:
        return None
    found = _RANGE.fullmatch(text.strip().replace(" ", ""))
    if not found or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, end = max(0, size - int(found[2])), size
    else:
        start, end = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
        if found[2] and int(found[2]) < start:
            return None  # not a range, by the grammar: ignored
    if start >= size or end <= start:
        raise RefusedError(416, f"there is no such range in {size} bytes")
    return start, end


class FileAnswer:
    """What is said of a file with this hash and size; decides between 200, 206, 304 and 416."""

    def __init__(self, request: web.BaseRequest, sha256: str, size: int, location: str, modified: float | None) -> None:
        self.request, self.size = request, size
        self.etag = f'"{sha256}"'
        self.headers = {"Server": SERVER, "Accept-Ranges": "bytes", "ETag": self.etag}
        self.headers["Content-Type"] = content_type(location)
        self.modified = modified
        if modified is not None:
            self.headers["Last-Modified"] = http_date(modified)

    @property
    def unchanged(self) -> bool:
        """Does the client have it already?"""
        tags = self.request.headers.get("If-None-Match")
        if tags is not None:
            return self.etag in tags or tags.strip() == "*"
        since = parse_date(self.request.headers.get("If-Modified-Since", ""))
        return since is not None and self.modified is not None and int(self.modified) <= since

    def range(self) -> tuple[int, int] | None:
        """The part that is wanted; None for all. Raises RefusedError (416)."""
        condition = self.request.headers.get("If-Range", "").strip()
        if condition and condition != self.etag:
            since = parse_date(condition)
            if since is None or self.modified is None or int(self.modified) != int(since):
                return None
        return parse_range(self.request.headers.get("Range", ""), self.size)

    def response(self, part: tuple[int, int] | None) -> web.StreamResponse:
        headers = dict(self.headers)
        start, end = part or (0, self.size)
        headers["Content-Length"] = str(end - start)
        if part:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{self.size}"
        return web.StreamResponse(status=206 if part else 200, headers=headers)

    def not_modified(self) -> web.Response:
        kept = {name: value for name, value in self.headers.items() if name in ("Server", "ETag", "Last-Modified")}
        return web.Response(status=304, headers=kept)


async def stored(answer: FileAnswer, path: Path, sent: Sent, rate: Rate | None = None) -> web.StreamResponse:
    """A file of the store. Raises RefusedError (416, 404)."""
    if answer.unchanged:
        return answer.not_modified()
    part = answer.range()
    start, end = part or (0, answer.size)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        raise RefusedError(404, "it has just been removed from the cache") from None
    try:
        response = answer.response(part)
        await response.prepare(answer.request)
        if answer.request.method == "GET":
            await _send(response, descriptor, start, end, sent, rate)
        await response.write_eof()
    finally:
        os.close(descriptor)
    return response


async def _send(
    response: web.StreamResponse,
    descriptor: int,
    start: int,
    end: int,
    sent: Sent,
    rate: Rate | None = None,
    *,
    fresh: bool = False,
) -> None:
    most = min(CHUNK, rate.piece) if rate is not None else CHUNK
    while start < end:
        count = min(most, end - start)
        # What has just arrived is in memory; what lies in the store may have to come from a slow disk.
        data: bytes | bytearray | None
        data = os.pread(descriptor, count, start) if fresh else _in_memory(descriptor, count, start)
        if data is None:
            data = await asyncio.to_thread(os.pread, descriptor, count, start)
        if not data:
            response.force_close()
            return
        if rate is not None:
            await rate.take(len(data))
        await response.write(data)
        sent(len(data))
        start += len(data)


def _in_memory(descriptor: int, count: int, start: int) -> bytearray | None:
    """What can be read without waiting for the disk (preadv2(2), RWF_NOWAIT); None if nothing can."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    data = bytearray(count)
    try:
        got = os.preadv(descriptor, [data], start, os.RWF_NOWAIT)
    except OSError:  # EAGAIN; EOPNOTSUPP of a file system that can't tell
        return None
    del data[got:]
    return data if got else None


async def arriving(answer: FileAnswer, download: Download, sent: Sent) -> web.StreamResponse:
    """A file while it is fetched. Raises RefusedError as long as nothing has been sent.

    If it goes wrong later, the connection is closed before the length that was promised is reached. A
    part that may be wrong has neither ETag nor date, so that nobody goes on from it.
    """
    if answer.unchanged:
        return answer.not_modified()
    part = answer.range()
    start, end = part or (0, answer.size)
    available = await download.wait(start)
    generation = download.generation
    if download.tainted and not download.verified:
        for name in ("ETag", "Last-Modified", "Accept-Ranges"):
            answer.headers.pop(name, None)
    descriptor = os.open(download.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        response = answer.response(part)
        await response.prepare(answer.request)
        if answer.request.method == "GET":
            try:
                while start < end:
                    if available <= start:
                        available = await download.wait(start, generation)
                    if generation != download.generation:
                        generation = download.generation
                        os.close(descriptor)
                        descriptor = os.open(download.path, os.O_RDONLY | os.O_CLOEXEC)
                    until = min(end, available)
                    await _send(response, descriptor, start, until, sent, fresh=True)
                    start = until
            except (RefusedError, RestartedError):
                response.force_close()
                if answer.request.transport is not None:
                    answer.request.transport.close()
                return response
        await response.write_eof()
    finally:
        os.close(descriptor)
    return response
