"""Starts, asks and stops the background package cache (`hostos.mirror.daemon`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hostos import background
from hostos.errors import UserError
from hostos.machine.files import write_atomic
from hostos.mirror import upstreams
from hostos.mirror.ledger import Ledger
from hostos.mirror.settings import Settings
from hostos.mirror.store import Store
from hostos.paths import data_dir, private_dir, runtime_dir, state_dir


def place() -> background.Place:
    return background.Place(state_dir() / "mirror", runtime_dir() / "mirror.sock", "mirror")


def data() -> Path:
    """Store, catalogue and ledger."""
    return data_dir() / "mirror"


def start(settings: Settings) -> dict[str, Any]:
    """Start it unless it runs; returns its status. Raises UserError or a failure."""
    where = place()
    private_dir(where.directory)
    private_dir(where.socket.parent)
    file = where.directory / "settings.json"
    text = settings.to_json()
    with background.changing(where):
        if (running := status()) is not None:
            if file.exists() and file.read_text() == text:
                return running
            raise UserError("the mirror runs already, with other settings", "hostos mirror stop, then start it again")
        write_atomic(file, text.encode())
        command = [sys.executable, "-m", "hostos.mirror.daemon", "--settings", str(file)]
        command += ["--state", str(where.directory), "--socket", str(where.socket)]
        command += ["--data", str(data()), "--upstreams", str(upstreams.path())]
        background.spawn(
            where, command, hint="another program may have the port: choose one with --listen ADDRESS:PORT"
        )
        running = status()
    if running is None:
        raise background.vanished(where)
    return running


def status() -> dict[str, Any] | None:
    """What the running cache says of itself; None if none runs."""
    return background.request(place(), "status")


def stop() -> bool:
    """Stop it; returns whether it ran."""
    return background.stop(place())


def proxy_url() -> str | None:
    """The running cache as a proxy for this host's package managers, None if none runs."""
    running = status()
    if running is None:
        return None
    local = [address for address in running["listen"] if address.startswith(("127.", "0.0.0.0:"))]
    return f"http://{local[0].replace('0.0.0.0', '127.0.0.1')}" if local else None


def proxy_for(url: str) -> str | None:
    """The cache as a proxy for the archive at `url`: None unless it runs here and caches that archive. For
    whatever fetches packages: `Acquire::http::Proxy`."""
    if not url.startswith("http://") or (proxy := proxy_url()) is None:
        return None
    known = upstreams.load() or upstreams.Upstreams()
    return proxy if known.find_apt(f"{url.removeprefix('http://').rstrip('/')}/") else None


def stats() -> dict[str, Any]:
    """What has passed through it, by archive and by peer, since it was first started."""
    answer = background.request(place(), "stats")
    if answer is not None:
        return {"archives": answer["archives"], "peers": answer["peers"]}
    ledger = Ledger(private_dir(data()) / "ledger.db")
    try:
        return {"archives": ledger.traffic(), "peers": ledger.peers()}
    finally:
        ledger.close()


@contextmanager
def store() -> Iterator[Store]:
    """The store, to look at or to clean while the cache runs or not."""
    ledger = Ledger(private_dir(data()) / "ledger.db")
    try:
        yield Store(data(), ledger)
    finally:
        ledger.close()
