"""A web server over a directory, with ranges, good or bad: `DIRECTORY HOST:PORT [HOW]`.

HOW: `good`; `lying` (spoils a byte of every answer); `whole` (knows no ranges); `shifted` (sends another part
than it was asked for); `truncated`; `hanging`; `missing` (404); `slow:RATE` (bytes per second).
"""

from __future__ import annotations

import re
import time

from serving import Serving, serve


class Handler(Serving):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        file = self.directory / self.path.lstrip("/")
        if self.how == "hanging":
            time.sleep(3600)
        if self.how == "missing" or not file.is_file():
            self.send_error(404)
            return
        content = bytearray(file.read_bytes())
        size = len(content)
        asked = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", self.headers.get("Range", ""))
        if asked and self.how != "whole":
            start, end = int(asked[1]), min(int(asked[2]), size - 1)
            content = content[start : end + 1]
            if self.how == "shifted":
                start, end = start + 1, end + 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        else:
            self.send_response(200)
        if self.how == "lying":
            content[len(content) // 2] ^= 1
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.how == "truncated":
            del content[len(content) // 2 :]
            self.close_connection = True
        step = 4096 if self.how == "slow" else len(content) or 1
        for begin in range(0, len(content), step):
            self.wfile.write(content[begin : begin + step])
            if self.how == "slow":
                time.sleep(4096 / self.amount)


if __name__ == "__main__":
    serve(Handler)
