"""A client we had no hand in, given only a layer's magnet link and the seed's address."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostos.image import seeding
from hostos.image.store import Store
from hostos.live.manifest import Layer, Manifest
from hostos.live.torrents import Torrent, make_layer_torrent

pytestmark = [
    pytest.mark.swarm,
    pytest.mark.skipif(not shutil.which("qbittorrent-nox"), reason="needs qbittorrent-nox"),
]

CONFIG = """\
[LegalNotice]
Accepted=true

[BitTorrent]
Session\\Encryption=1
Session\\DHTEnabled=false
Session\\LSDEnabled=false
Session\\PeXEnabled=false
Session\\Interface=lo
Session\\InterfaceName=lo
Session\\InterfaceAddress=127.0.0.1
Session\\Port={port}
Session\\DefaultSavePath={directory}

[Network]
PortForwardingEnabled=false

[Preferences]
Connection\\ResolvePeerCountries=false
WebUI\\Address=127.0.0.1
WebUI\\Port={web}
WebUI\\LocalHostAuth=false
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def layer(home: Path) -> Torrent:
    store = Store()
    with store.incoming() as temporary:
        path = temporary / "layer"
        path.write_bytes(random.Random(5).randbytes(5_000_001))
        torrent = make_layer_torrent(path)
        manifest = Manifest("test", "x86_64", (Layer(torrent.info_hash, torrent.size, torrent.name),))
        store.add(manifest, [(torrent, path)])
    return torrent


@pytest.fixture
def client(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A running qBittorrent: its port for the web interface, and where it saves."""
    web, profile, directory = free_port(), tmp_path / "profile", tmp_path / "downloads"
    config = profile / "qBittorrent/config/qBittorrent.conf"
    config.parent.mkdir(parents=True)
    directory.mkdir()
    config.write_text(CONFIG.format(port=free_port(), web=web, directory=directory))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["qbittorrent-nox", f"--profile={profile}"], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        end = time.monotonic() + 30
        while True:
            try:
                ask(web, "app/version")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
        yield web, directory
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(web: int, method: str, **form: str) -> bytes:
    data = "&".join(f"{key}={urllib.request.quote(value, safe='')}" for key, value in form.items()).encode() or None
    with urllib.request.urlopen(f"http://127.0.0.1:{web}/api/v2/{method}", data, timeout=10) as answer:
        return bytes(answer.read())


def test_qbittorrent_downloads_the_same_bytes(layer: Torrent, client: tuple[int, Path]) -> None:
    web, directory = client
    info = seeding.start()
    assert ask(web, "torrents/add", urls=layer.magnet([info.address])) == b"Ok."
    end = time.monotonic() + 120
    state: list[dict[str, Any]] = []
    while not (state and state[0]["progress"] == 1 and state[0]["amount_left"] == 0 and state[0]["size"] > 0):
        assert time.monotonic() < end, state
        time.sleep(0.2)
        state = json.loads(ask(web, "torrents/info"))
    assert state[0]["infohash_v2"] == layer.info_hash
    [image] = Store().images()
    source = Store().layer_path(image.manifest.layers[0])
    assert (directory / layer.name).read_bytes() == source.read_bytes()
