"""The other side of the daemon's protocol, over anything that reads and writes bytes."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hostos.errors import failure
from hostos.live import protocol


class Stream(Protocol):
    """What a client needs of its connection: a file, or an SSH channel bridged to the socket."""

    def readline(self) -> bytes: ...

    def write(self, data: bytes, /) -> Any: ...

    def flush(self) -> Any: ...

    def close(self) -> Any: ...


_LOG = "see its log: hostos ssh -- journalctl -u hostos-live"

Listener = Callable[[dict[str, Any]], None]


class Client:
    """Asks the daemon. What it holds (`prepare(hold=True)`) ends with the connection."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()

    def settimeout(self, seconds: float) -> None:
        """Seconds to wait for each line from now on, where the connection can limit that."""
        if limit := getattr(self._stream, "settimeout", None):
            limit(seconds)

    def ask(self, op: str, listener: Listener | None = None, /, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for its result; events go to `listener`.

        Fields that are None are left out. Raises UserError if the daemon refuses or is gone.
        """
        request = {"schema": protocol.SCHEMA, "op": op}
        request |= {name: value for name, value in fields.items() if value is not None}
        try:
            self._stream.write(protocol.encode(request))
            self._stream.flush()
            while line := self._stream.readline():
                message = protocol.decode_answer(line)
                if "event" not in message:
                    return message
                if listener:
                    listener(message)
        except TimeoutError:
            raise failure(f"the live-boot daemon did not answer {op!r} in time", _LOG) from None
        except OSError as error:
            raise failure(f"the connection to the live-boot daemon broke: {error}", _LOG) from None
        raise failure("the live-boot daemon closed the connection", _LOG)

    def manifest(self, image: str, **fields: Any) -> Mapping[str, Any]:
        """The image's manifest as decoded JSON."""
        found: dict[str, Any] = json.loads(self.ask("inspect", image=image, **fields)["manifest"])
        return found


def connect(path: Path, timeout: float | None = None) -> Client:
    """A client of the daemon on this machine. Raises UserError if none listens there.

    `timeout`: seconds to wait for each answer (None: as long as it takes).
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise failure(
            f"no live-boot daemon answers at {path}: {error.strerror}",
            "start it: python3 -m hostos.live --help",
        ) from None
    stream = connection.makefile("rwb")
    connection.close()  # the file keeps it open
    return Client(stream)
