"""Downloads against a real HTTP server that misbehaves."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hostos.build import debian_archive
from hostos.build.debian_archive import Archive, Gone, Package
from hostos.errors import UserError

DATA = b"a package" * 1000


class Mirror(BaseHTTPRequestHandler):
    """Answers with the statuses in `script`, one after the other; 200 sends `body`."""

    script: list[int] = []  # noqa: RUF012
    body = DATA
    asked = 0

    def do_GET(self):
        kind = type(self)
        status = kind.script[min(kind.asked, len(kind.script) - 1)]
        kind.asked += 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(kind.body) if status == 200 else 0))
        self.end_headers()
        if status == 200:
            self.wfile.write(kind.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path))
    monkeypatch.setattr(debian_archive, "PAUSE_S", 0.01)
    handler = type("Scripted", (Mirror,), {"script": [200], "body": DATA, "asked": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HOSTOS_MIRROR", f"http://127.0.0.1:{server.server_port}")
        yield handler
        server.shutdown()
        thread.join()


PACKAGE = Package("x", "1:2", "amd64", "pool/x.deb", len(DATA), hashlib.sha256(DATA).hexdigest(), "x")


class Quiet:
    def progress(self, detail):
        pass


def fetch():
    return Archive("trixie", "x86_64").fetch([PACKAGE], Quiet())[0]


def test_what_was_fetched_is_kept(mirror):
    assert fetch().read_bytes() == DATA
    fetch()
    assert mirror.asked == 1


def test_a_mirror_that_hiccups_is_asked_again(mirror):
    mirror.script = [503, 502, 200]
    assert fetch().read_bytes() == DATA


def test_a_package_that_is_gone_is_told_apart(mirror):
    mirror.script = [404]
    with pytest.raises(Gone, match="x 1:2"):
        fetch()
    assert mirror.asked == 1


def test_a_mirror_that_stays_down_is_no_reason_to_renew_the_lock(mirror):
    mirror.script = [503]
    with pytest.raises(UserError) as caught:
        fetch()
    assert not isinstance(caught.value, Gone)
    assert mirror.asked == debian_archive.ATTEMPTS


def test_other_bytes_are_never_kept(mirror):
    mirror.body = DATA + b"!"
    with pytest.raises(UserError, match="SHA-256"):
        fetch()
    assert not list(debian_archive.Archive("trixie", "x86_64").pool.iterdir())
