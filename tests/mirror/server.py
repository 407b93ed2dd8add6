"""A web server that can misbehave: the archive's mirror, and peers that lie.

Run as a program (for network namespaces): `python server.py ADDRESS:PORT DIRECTORY`; with `--lie`, it is a peer
that sends zeros for each file of the directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Served:
    path: str
    range: str
    status: int
    sent: int = 0


@dataclass
class Faults:
    """What it does wrong, for paths that match `only`."""

    only: str = ".*"
    down: bool = False
    status: int = 0
    cut_at: int = -1
    """Close the connection after so many bytes of the file, once."""
    pause_at: int = -1
    """Wait at this byte of the file until `go` is set."""
    rate: int = 0
    """Bytes per second."""
    delay: float = 0.0
    """Seconds until it begins to answer."""
    change: Callable[[bytes], bytes] | None = None
    """What is sent instead of the file."""
    claim: int | None = None
    """The size it says the file has."""
    endless: bool = False
    ignore_range: bool = False
    go: threading.Event = field(default_factory=threading.Event)

    def matches(self, path: str) -> bool:
        return re.search(self.only, path) is not None


class Web:
    """Serves `root` (with /sha256/<hex> if `by_hash` finds a file) on `address`; `log` is what it served."""

    def __init__(
        self, root: Path, address: str = "127.0.0.1", by_hash: Callable[[str], Path | None] | None = None
    ) -> None:
        self.root, self.by_hash = root, by_hash
        self.faults = Faults(only="$^")
        self.log: list[Served] = []
        self.waiting = self.most_waiting = 0
        """Requests that are being delayed at the same time."""
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(OSError):
                    web.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 512
            address_family = socket.AF_INET6 if address.count(":") > 1 else socket.AF_INET

            def handle_error(self, *_: object) -> None:
                pass

        host, _, port = address.partition(":")
        self.server = Server((host, int(port or 0)), Handler)
        self.address = f"{host}:{self.server.server_address[1]}"
        self.url = f"http://{self.address}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.faults.go.set()
        self.server.shutdown()
        self.server.server_close()

    def sent(self, pattern: str = ".") -> int:
        """Bytes of files whose path matches."""
        return sum(each.sent for each in self.log if re.search(pattern, each.path))

    def asked(self, pattern: str) -> list[Served]:
        return [each for each in self.log if re.search(pattern, each.path)]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path
        faults = self.faults if self.faults.matches(path) else Faults()
        said = Served(path, request.headers.get("Range", ""), 0)
        self.log.append(said)
        if faults.down:
            request.close_connection = True
            return
        if faults.delay:
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
            time.sleep(faults.delay)
            self.waiting -= 1
        file = self._find(path)
        if faults.status or file is None:
            said.status = faults.status or 404
            request.send_response(said.status)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        since = request.headers.get("If-Modified-Since")
        modified = int(file.stat().st_mtime)
        if since and parsedate_to_datetime(since).timestamp() >= modified:
            said.status = 304
            request.send_response(304)
            request.end_headers()
            return
        data = file.read_bytes()
        if faults.change:
            data = faults.change(data)
        start, end = 0, len(data)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", said.range)
        partial = found is not None and not faults.ignore_range
        if found and partial:
            start, end = int(found[1]), min(len(data), int(found[2] or len(data)) + 1)
        said.status = 206 if partial else 200
        size = faults.claim if faults.claim is not None else len(data)
        request.send_response(said.status)
        request.send_header("Last-Modified", formatdate(modified, usegmt=True))
        if partial:
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        if faults.endless:
            request.send_header("Connection", "close")
            request.close_connection = True
        else:
            request.send_header("Content-Length", str(end - start if partial else size))
        request.end_headers()
        self._send(request, said, data, start, end, faults)

    def _send(
        self, request: BaseHTTPRequestHandler, said: Served, data: bytes, start: int, end: int, faults: Faults
    ) -> None:
        step = max(1, faults.rate // 20) if faults.rate else 1 << 16
        while start < end:
            until = min(end, start + step)
            for limit in (faults.cut_at, faults.pause_at):
                if start < limit:
                    until = min(until, limit)
            request.wfile.write(data[start:until])
            said.sent += until - start
            start = until
            if start == faults.pause_at:
                faults.go.wait(60)
            if start == faults.cut_at:
                faults.cut_at = -1
                request.close_connection = True
                return
            if faults.rate:
                time.sleep(0.05)
        while faults.endless:
            request.wfile.write(bytes(1 << 16))
        if faults.claim is not None:
            request.close_connection = True

    def _find(self, path: str) -> Path | None:
        from urllib.parse import unquote

        if found := re.fullmatch(r"/sha256/([0-9a-f]{64})", path):
            return self.by_hash(found[1]) if self.by_hash else None
        file = self.root / unquote(path).lstrip("/")
        return file if file.is_file() else None


def hashes(root: Path) -> dict[str, Path]:
    """SHA-256 -> file, of everything below `root`."""
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in root.rglob("*") if path.is_file()}


if __name__ == "__main__":
    served = Web(Path(sys.argv[2]), sys.argv[1])
    if "--lie" in sys.argv:
        served.by_hash = hashes(served.root).get
        served.faults = Faults(change=lambda data: bytes(len(data)))
    print("ready", flush=True)
    with contextlib.suppress(BrokenPipeError):
        for _ in sys.stdin:
            # What was sent so far, by kind.
            print(served.sent(r"\.deb"), served.sent("."), flush=True)
