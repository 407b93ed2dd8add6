"""HTTP answers: those of honest servers are read, anything else ends with an error and little memory."""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.live.http import Answer, Connection, HttpError
from hostos.live.url import parse_url

URL = parse_url("http://127.0.0.1:8080/gate")


def get(answer: bytes, *, limit: int = 1000, cuts: int = 7, close: bool = True) -> tuple[Answer, bool]:
    """What is made of an answer that comes in pieces; whether the connection could be used again."""

    async def main() -> tuple[Answer, bool]:
        ours, theirs = trio.testing.memory_stream_pair()
        connection = Connection(URL, ours)

        async def serve() -> None:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                request += await theirs.receive_some(100)
            assert request.startswith(b"GET /gate/x HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n")
            for start in range(0, len(answer), cuts):
                await theirs.send_all(answer[start : start + cuts])
            if close:
                await theirs.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with trio.fail_after(5):
                found = await connection.get("/x", "text/plain", limit)
            nursery.cancel_scope.cancel()
        return found, connection.reusable

    try:
        return trio.run(main)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def test_forms_of_answers() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Plain; charset=x\r\n"
    whole = Answer(200, "text/plain", b"hello")
    assert get(head + b"Content-Length: 5\r\n\r\nhello", close=False) == (whole, True)
    assert get(head + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello") == (whole, False)
    chunked = b"Transfer-Encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n03\r\nllo\r\n0\r\nTrailer: x\r\n\r\n"
    assert get(head + chunked, close=False) == (whole, True)
    assert get(head + b"\r\nhello") == (whole, False)
    assert get(b"HTTP/1.0 404 \r\ncontent-length: 0\r\n\r\n") == (Answer(404, "", b""), False)
    assert get(b"HTTP/1.1 204 No Content\r\n\r\n")[0] == Answer(204, "", b"")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFF\r\n" + b"x" * 2000,
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000,
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000,
        b"\r\n\r\n",
    ],
)
def test_answers_that_are_none(answer: bytes) -> None:
    with pytest.raises(HttpError):
        get(answer, cuts=5000)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_an_answer_or_an_error(noise: bytes, begun: bool) -> None:
    with contextlib.suppress(HttpError):
        found, _ = get((b"HTTP/1.1 200 OK\r\n" if begun else b"") + noise, cuts=50)
        assert len(found.body) <= 1000


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://localhost", "http://localhost:80"),
        ("https://Example.org/a/b/", "https://example.org:443/a/b"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    assert str(parse_url(text)) == url
    assert parse_url(url) == parse_url(text)


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1:8080", "ftp://x", "http://", "http://x:0", "http://x:99999", "http://u:p@x", "http://x/?a",
     "http://x/a b", "http://x/\r\nHost: y", "http://x\r\n/", "http://x/#a", "http://a/../b c"],
)  # fmt: skip
def test_addresses_of_nothing(text: str) -> None:
    with pytest.raises(UserError):
        parse_url(text)


@given(st.text(max_size=60))
def test_no_address_smuggles_lines_into_the_request(text: str) -> None:
    try:
        url = parse_url("http://" + text)
    except UserError:
        return
    assert not set(str(url)) & set("\r\n \0")
