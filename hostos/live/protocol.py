"""The daemon's protocol: one JSON object per line, both ways, over a Unix socket.

A request is `{"schema": 1, "op": NAME, …}`. It is answered by any number of `{"event": …}` lines
and then one `{"ok": true, …}` or `{"ok": false, "error": MESSAGE, "hint": …, "status": N}`.
Requests on one connection are served in order. docs/live-boot.md lists them.
"""

from __future__ import annotations

import json
from typing import Any

from hostos.errors import BAD_INPUT, UserError

SCHEMA = 1
MAX_LINE = 128 * 1024 * 1024
"""Longest line, bytes: an image's whole metadata in base64 fits."""

_MISSING = object()


def encode(message: dict[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def event(kind: str, /, **fields: Any) -> dict[str, Any]:
    return {"event": kind, **fields}


def success(**fields: Any) -> dict[str, Any]:
    return {"ok": True, "schema": SCHEMA, **fields}


def failed(error: UserError) -> dict[str, Any]:
    return {"ok": False, "error": error.message, "hint": error.hint, "status": error.status}


def decode_answer(line: bytes) -> dict[str, Any]:
    """The event or result in a line. Raises UserError if the answer is a refusal or none at all."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or not ("event" in message or isinstance(message.get("ok"), bool)):
        raise UserError(f"the live-boot daemon gave an answer that makes no sense: {line[:120]!r}", status=1)
    if message.get("ok") is False:
        status = message.get("status")
        raise UserError(
            str(message.get("error", "refused without a reason")),
            str(message.get("hint", "")),
            status=status if type(status) is int and 0 < status < 126 else 1,
        )
    return message


def _mistake(why: str) -> UserError:
    return UserError(f"request to the live-boot daemon: {why}", status=BAD_INPUT)


class Request:
    """A request whose fields are taken one by one, each checked; `done()` refuses what is left."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = dict(fields)
        schema = self._fields.pop("schema", None)
        if type(schema) is not int or schema != SCHEMA:
            raise UserError(
                f"request with schema {str(schema)[:20]}, this live-boot daemon knows {SCHEMA}",
                "host and guest are of different versions: rebuild the older one",
            )
        self.op = self.text("op")

    @classmethod
    def parse(cls, line: bytes) -> Request:
        """Raises UserError on anything that is not a request."""
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            raise _mistake("not JSON") from None
        if not isinstance(fields, dict):
            raise _mistake("not an object")
        return cls(fields)

    def _take(self, name: str, default: Any) -> Any:
        value = self._fields.pop(name, default)
        if value is _MISSING:
            raise _mistake(f"{name!r} is missing")
        return value

    def text(self, name: str, default: Any = _MISSING) -> str:
        value = self._take(name, default)
        if not isinstance(value, str) or "\0" in value:
            raise _mistake(f"{name!r} is not a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _mistake(f"{name!r} is not UTF-8") from None
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty if it is not there."""
        values = self._take(name, [])
        if not isinstance(values, list) or len(values) > 65536:
            raise _mistake(f"{name!r} is not a list")
        for value in values:
            if not isinstance(value, str) or "\0" in value or _surrogates(value):
                raise _mistake(f"{name!r} is not a list of strings")
        return tuple(values)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise _mistake(f"{name!r} is not true or false")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _mistake(f"{name!r} is not a number from {low:g} to {high:g}")
        return float(value)

    def object(self, name: str) -> dict[str, Any] | None:
        value = self._take(name, None)
        if value is not None and not isinstance(value, dict):
            raise _mistake(f"{name!r} is not an object")
        return value

    def done(self) -> None:
        """Everything known has been taken. Raises UserError if something is left over."""
        if self._fields:
            raise _mistake(f"{self.op!r} does not know {sorted(self._fields)[0][:40]!r}")


def _surrogates(value: str) -> bool:
    return any(0xD800 <= ord(letter) < 0xE000 for letter in value)
