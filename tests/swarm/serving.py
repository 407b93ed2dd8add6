"""What the small HTTP servers of these tests have in common: `SCRIPT DIRECTORY HOST:PORT [HOW[:AMOUNT]]`."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Serving(BaseHTTPRequestHandler):
    """Of which `directory` to serve, `how` to misbehave ("good": not), and by how much."""

    directory: Path
    how: str
    amount: float


class Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # whoever asked has gone


def serve(handler: type[Serving]) -> None:
    """Serve as the command line says, and say when it is ready."""
    handler.directory = Path(sys.argv[1])
    host, _, port = sys.argv[2].rpartition(":")
    handler.how, _, amount = (sys.argv[3] if len(sys.argv) > 3 else "good").partition(":")
    handler.amount = float(amount or 1)
    server = Server((host, int(port)), handler)
    print("ready", flush=True)
    server.serve_forever()
