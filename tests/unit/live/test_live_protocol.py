"""The daemon's protocol: whatever arrives is a request or a refusal."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError, failure
from hostos.live import protocol
from hostos.live.client import Client
from hostos.live.protocol import Request

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary())
def test_any_bytes_are_parsed_or_refused(line: bytes) -> None:
    with contextlib.suppress(UserError):
        assert isinstance(Request.parse(line).op, str)


@given(JSON, JSON, JSON)
def test_fields_have_their_types_or_are_refused(text: Any, listed: Any, number: Any) -> None:
    fields = {"schema": 1, "op": "x", "text": text, "listed": listed, "flag": number, "number": number, "object": text}
    line = protocol.encode(fields)
    assert line.count(b"\n") == 1
    request = Request.parse(line)
    for take, kind in (
        (lambda: request.text("text"), str),
        (lambda: request.texts("listed"), tuple),
        (lambda: request.flag("flag"), bool),
        (lambda: request.number("number", 0, -5, 5), float),
        (lambda: request.object("object"), dict | None),
    ):
        try:
            value = take()
        except UserError:
            continue
        assert isinstance(value, kind)  # type: ignore[arg-type]
        if isinstance(value, tuple):
            assert all(isinstance(item, str) and "\0" not in item for item in value)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"op": "list"}, "schema None"),
        ({"schema": 2, "op": "list"}, "schema 2"),
        ({"schema": True, "op": "list"}, "schema True"),
        ({"schema": 1}, "'op' is missing"),
        ({"schema": 1, "op": 5}, "'op' is not a string"),
    ],
)
def test_requests_without_what_all_have(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        Request(fields)


def test_unknown_fields_are_refused() -> None:
    request = Request({"schema": 1, "op": "list", "colour": "blue"})
    with pytest.raises(UserError, match="'list' does not know 'colour'"):
        request.done()


def test_half_a_surrogate_is_refused() -> None:
    request = Request.parse(b'{"schema":1,"op":"x","name":"\\ud800","words":["\\ud800"]}')
    with pytest.raises(UserError, match="UTF-8"):
        request.text("name")
    with pytest.raises(UserError, match="strings"):
        request.texts("words")


def test_refusal_arrives_as_it_was_raised() -> None:
    sent = failure("nobody had it", "ask another")
    with pytest.raises(UserError) as caught:
        protocol.decode_answer(protocol.encode(protocol.failed(sent)))
    assert (caught.value.message, caught.value.hint, caught.value.status) == ("nobody had it", "ask another", 1)


@given(st.binary())
def test_any_answer_is_understood_or_refused(line: bytes) -> None:
    try:
        message = protocol.decode_answer(line)
    except UserError:
        return
    assert "event" in message or message["ok"] is True


class Wire:
    """The two directions of a connection as memory."""

    def __init__(self, answers: bytes) -> None:
        self._answers, self.sent = io.BytesIO(answers), b""

    def readline(self) -> bytes:
        return self._answers.readline()

    def write(self, data: bytes, /) -> int:
        self.sent += data
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_client_hands_events_on_and_returns_the_result() -> None:
    wire = Wire(protocol.encode(protocol.event("step", name="layers")) + protocol.encode(protocol.success(name="web")))
    events: list[dict[str, Any]] = []
    assert Client(wire).ask("prepare", events.append, name="web", bundle=None)["name"] == "web"
    assert events == [{"event": "step", "name": "layers"}]
    assert json.loads(wire.sent) == {"schema": 1, "op": "prepare", "name": "web"}


def test_client_of_a_daemon_that_went_away() -> None:
    with pytest.raises(UserError, match="closed the connection") as caught:
        Client(Wire(b"")).ask("hello")
    assert caught.value.status == 1
