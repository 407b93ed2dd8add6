"""Serves the records of one's own names over HTTP: `GET /hostos/names/KEY/NAME`. Nothing else is served."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hostos.errors import UserError
from hostos.names.book import Names
from hostos.names.push import put_again
from hostos.names.sources import PATH, Dht

_TIMEOUT = 10.0
REPUBLISH = 3600.0
"""Seconds between puts into the DHT, whose nodes forget a value after two hours (BEP 44)."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _TIMEOUT
    names: Names
    server_version = "hostos"
    sys_version = ""

    def do_GET(self) -> None:
        data = self._record()
        self.send_response(200 if data else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        self.wfile.write(data)

    def _record(self) -> bytes:
        parts = self.path.removeprefix(PATH).split("/")
        if not self.path.startswith(f"{PATH}/") or len(parts) != 3:
            return b""
        _, key, name = parts
        try:
            if key != self.names.public_key():
                return b""
            found = self.names.last(key, name)
        except UserError:
            return b""
        return found.to_json() if found else b""

    def log_message(self, format: str, *arguments: object) -> None:
        """Who asked is nobody's business."""


def server(host: str, port: int, names: Names) -> ThreadingHTTPServer:
    """Listens there; `serve_forever` serves. Raises UserError if it can't."""
    handler = type("Handler", (_Handler,), {"names": names})
    try:
        return ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        hint = "give another --listen ADDRESS:PORT"
        raise UserError(f"can't listen on {host}:{port}: {error.strerror}", hint) from None


def republish(names: Names, stop: threading.Event, warn: Callable[[str], None]) -> None:
    """Put all of one's own names into the DHT nodes one chose, now and every `REPUBLISH` seconds, until `stop`."""
    while True:
        key, public, nodes = names.key(), names.public_key(), names.book().dht
        if key and nodes:
            with Dht(nodes) as dht:
                for record in names.all():
                    if record.key == public:
                        try:
                            put_again(dht, key, record)
                        except UserError as error:
                            warn(f"{record.name}: {error.message}")
        if stop.wait(REPUBLISH):
            return
