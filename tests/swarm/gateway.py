"""A trustless gateway over a directory of blocks, good or bad: `DIRECTORY HOST:PORT [HOW]`.

HOW: `good`; `lying` (spoils a byte of every block), `lying:SHARE` of the blocks; `truncated`; `slow:RATE`
(bytes per second), `hanging` (never answers), `html` (an error page with status 200), `missing` (404),
`oversized` (a block without end), `delay:SECONDS`.
"""

from __future__ import annotations

import random
import time

from serving import Serving, serve


class Handler(Serving):
    protocol_version = "HTTP/1.1"
    noise = random.Random(4)

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, kind: str, body: bytes, *, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.how == "slow":
            for start in range(0, len(body), 4096):
                self.wfile.write(body[start : start + 4096])
                time.sleep(4096 / self.amount)
            return
        self.wfile.write(body)

    def do_GET(self) -> None:  # noqa: N802
        path, _, query = self.path.partition("?")
        file = self.directory / path.removeprefix("/ipfs/")
        assert query == "format=raw", self.path
        with (self.directory.parent / f"asked-{self.server.server_address[1]}").open("a") as log:
            log.write(f"{file.name}\n")
        if self.how == "hanging":
            time.sleep(3600)
        if self.how == "delay":
            time.sleep(self.amount)
        if self.how == "missing" or not file.is_file():
            self.answer(404, "text/plain", b"not here\n")
            return
        block = bytearray(file.read_bytes())
        kind = "application/vnd.ipld.raw"
        if self.how == "html":
            self.answer(200, "text/html", b"<h1>Log in</h1>")
        elif self.how == "lying" and block and self.noise.random() < self.amount:
            block[len(block) // 2] ^= 1
            self.answer(200, kind, bytes(block))
        elif self.how == "truncated":
            self.answer(200, kind, bytes(block[: len(block) // 2]), length=len(block))
            self.close_connection = True
        elif self.how == "oversized":
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.close_connection = True
            for _ in range(4096):
                self.wfile.write(bytes(65536))
        else:
            self.answer(200, kind, bytes(block))


if __name__ == "__main__":
    serve(Handler)
