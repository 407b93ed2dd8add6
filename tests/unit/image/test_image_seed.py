"""The seed: a real process, asked over its socket, and real libtorrent peers that fetch from it."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import libtorrent
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos import background
from hostos.cli.swarm import parse_rate
from hostos.errors import UserError
from hostos.image import seeding
from hostos.image.seeding import Place, parse_listen
from hostos.image.store import Store
from hostos.live.manifest import Layer, Manifest
from hostos.live.swarm_settings import SwarmSettings
from hostos.live.torrents import ImageBundle, make_layer_torrent, verify_files

pytestmark = pytest.mark.usefixtures("home")


def put(name: str = "test", size: int = 300_000, seed: int = 1) -> ImageBundle:
    store = Store()
    with store.incoming() as temporary:
        path = temporary / "layer"
        path.write_bytes(random.Random(seed).randbytes(size))
        torrent = make_layer_torrent(path)
        layer = Layer(torrent.info_hash, torrent.size, torrent.name)
        image = store.add(Manifest(name, "x86_64", (layer,)), [(torrent, path)])
    return store.bundle(image)


def fetch(magnet: str, directory: Path, deadline: float = 30.0) -> Path:
    """Download a magnet link into `directory` with libtorrent; nothing but the link's peers is asked."""
    settings: Any = {
        "listen_interfaces": "127.0.0.1:0",
        # Else libtorrent tries plain text first, which the seed refuses, and is slow to try again.
        **SwarmSettings().settings(),
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_outgoing_utp": False,
    }
    session = libtorrent.session(settings)
    parameters = libtorrent.parse_magnet_uri(magnet)
    parameters.save_path = str(directory)
    parameters.flags &= ~(libtorrent.torrent_flags.auto_managed | libtorrent.torrent_flags.paused)
    handle = session.add_torrent(parameters)
    end = time.monotonic() + deadline
    while not handle.status().is_seeding:
        assert time.monotonic() < end, f"{handle.status().state} {handle.status().progress}"
        time.sleep(0.02)
    session.remove_torrent(handle)
    return directory / handle.status().name if handle.is_valid() else directory


def torrents(info: seeding.SeedInfo | None) -> set[str]:
    assert info is not None
    return {torrent["hash"] for torrent in info.details["torrents"]}


def gone(pid: int) -> bool:
    # Who adopts it may be slow to bury it.
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def kill(pid: int, number: signal.Signals) -> None:
    """Send a signal and wait until the process has ended of it, with all its threads."""
    os.kill(pid, number)
    end = time.monotonic() + 10
    while not gone(pid) or locked(Place.default().running):
        assert time.monotonic() < end
        time.sleep(0.02)


def locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_start_status_stop() -> None:
    assert seeding.status() is None
    assert seeding.stop() is False
    info = seeding.start()
    assert psutil.Process(info.pid).is_running()
    assert info.host == "127.0.0.1"
    socket.create_connection((info.host, info.port), 5).close()
    now = seeding.status()
    assert now is not None
    assert (now.pid, now.address) == (info.pid, info.address)
    assert seeding.start().pid == info.pid
    assert seeding.ensure_started().pid == info.pid
    assert seeding.stop() is True
    assert gone(info.pid)
    assert seeding.status() is None
    with pytest.raises(OSError):
        socket.create_connection((info.host, info.port), 5)
    # A link with its address stays good.
    assert seeding.start().port == info.port


def test_peers_get_image_and_layer_from_magnets_alone(tmp_path: Path) -> None:
    bundle = put()
    info = seeding.start()
    assert torrents(info) == {bundle.image, bundle.layers[0].info_hash}
    (tmp_path / "a").mkdir()
    fetch(bundle.torrent.magnet([info.address]), tmp_path / "a")
    got = {path: (tmp_path / "a/hostos-image" / path).read_bytes() for path in bundle.files}
    assert verify_files(bundle.image, got) == bundle
    (tmp_path / "b").mkdir()
    fetch(bundle.layers[0].magnet([info.address]), tmp_path / "b")
    source = Store().layer_path(bundle.manifest.layers[0])
    assert (tmp_path / "b" / bundle.layers[0].name).read_bytes() == source.read_bytes()
    status = seeding.status()
    assert status is not None
    assert status.details["uploaded"] >= 300_000


def test_what_is_published_while_it_runs_is_seeded_within_seconds() -> None:
    info = seeding.start()
    assert torrents(info) == set()
    first = put("one", seed=1)
    assert seeding.reload()
    assert first.image in torrents(seeding.status())
    # Also when nobody tells it.
    second = put("two", seed=2)
    end = time.monotonic() + 10
    while second.image not in torrents(seeding.status()):
        assert time.monotonic() < end
        time.sleep(0.05)
    Store().remove(first.image)
    seeding.reload()
    assert torrents(seeding.status()) == {second.image, second.layers[0].info_hash}


def test_a_damaged_layer_is_not_spread(tmp_path: Path) -> None:
    bundle = put(size=200_000)
    path = Store().layer_path(bundle.manifest.layers[0])
    data = bytearray(path.read_bytes())
    data[100_000] ^= 1
    path.write_bytes(data)
    info = seeding.start()
    with pytest.raises(AssertionError):
        fetch(bundle.layers[0].magnet([info.address]), tmp_path, 1.5)
    found = tmp_path / bundle.layers[0].name
    if found.exists():  # the good pieces may have come
        assert bytes(data) != found.read_bytes()
    assert seeding.status() is not None


def test_broken_images_do_not_hinder_the_others() -> None:
    good, bad, cut = put("good", seed=1), put("bad", seed=2), put("cut", seed=3)
    store = Store()
    (store.images_dir / bad.image / "layers/0.torrent").write_bytes(b"d8:announce")
    os.truncate(store.layer_path(cut.manifest.layers[0]), 5)
    (store.images_dir / "junk").mkdir()
    info = seeding.start()
    assert torrents(info) == {good.image, good.layers[0].info_hash}


def test_a_start_right_after_a_kill_waits_for_the_end() -> None:
    info = seeding.start()
    os.kill(info.pid, signal.SIGKILL)
    assert seeding.start().pid != info.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_seed_that_dies_leaves_nothing_in_the_way(number: signal.Signals) -> None:
    info = seeding.start()
    kill(info.pid, number)
    assert seeding.status() is None
    again = seeding.start()
    assert again.pid != info.pid
    assert again.port == info.port


def test_a_stale_pid_is_nobody(home: Path) -> None:
    """After a reboot the number may belong to anybody: here to this very process."""
    seeding.start()
    place = Place.default()
    info = json.loads(place.info.read_text())
    kill(info["pid"], signal.SIGKILL)
    place.info.write_text(json.dumps({**info, "pid": os.getpid()}))
    assert seeding.status() is None
    assert seeding.stop() is False
    place.info.write_text("{")
    assert seeding.start().pid != info["pid"]


def test_a_seed_that_hangs_is_told_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    info = seeding.start()
    monkeypatch.setattr(background, "ANSWER_DEADLINE", 0.3)
    monkeypatch.setattr(background, "STOP_DEADLINE", 1.0)
    os.kill(info.pid, signal.SIGSTOP)
    try:
        assert seeding.status() is None
        with pytest.raises(UserError, match="doesn't answer"):
            seeding.start()
        assert seeding.stop() is True
    finally:
        if not gone(info.pid):
            os.kill(info.pid, signal.SIGCONT)
    assert seeding.start().pid != info.pid


def test_starts_at_the_same_time_give_one_seed() -> None:
    found: list[Any] = []

    def one() -> None:
        found.append(seeding.start())

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    assert len({info.pid for info in found}) == 1


def test_a_taken_port_is_told_or_avoided() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}") as caught:
            seeding.start(f"127.0.0.1:{port}")
        assert caught.value.status == 2
        assert seeding.status() is None
        # Not asked for by name: another one does.
        Place.default().port.write_text(f"{port}\n")
        assert seeding.start().port not in (0, port)


def test_an_address_that_is_not_ours_is_told() -> None:
    with pytest.raises(UserError, match="can't listen on 192.0.2.1"):
        seeding.start("192.0.2.1:6881")
    assert seeding.status() is None


def test_another_address_than_the_running_one_is_told() -> None:
    info = seeding.start("127.0.0.2")
    assert info.host == "127.0.0.2"
    assert seeding.start("127.0.0.2").pid == info.pid
    with pytest.raises(UserError, match="already runs on 127.0.0.2"):
        seeding.start("127.0.0.1")


def test_the_upload_limit_holds_for_loopback_too(tmp_path: Path) -> None:
    bundle = put(size=600_000)
    info = seeding.start(swarm=SwarmSettings(upload_limit=300_000))
    began = time.monotonic()
    fetch(bundle.layers[0].magnet([info.address]), tmp_path, 60)
    assert time.monotonic() - began > 1.0


def test_the_control_socket_refuses_nonsense() -> None:
    seeding.start()
    with pytest.raises(UserError, match="unknown operation"):
        seeding.request("explode")
    for line in (b"\n", b"[]\n", b"{}\n", b"\xff\n", b"1\n", b'{"op": 1}\n', b'{"op":"status","schema":9}\n'):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(Place.default().socket))
            client.sendall(line)
            assert json.loads(client.makefile().readline())["ok"] is False
    with socket.socket(socket.AF_UNIX) as client:  # endless lines are cut off
        client.settimeout(10)
        client.connect(str(Place.default().socket))
        try:
            client.sendall(b"x" * 1_000_000)
            assert client.recv(100) == b""
        except ConnectionError:
            pass
    assert seeding.status() is not None
    assert Place.default().socket.stat().st_mode & 0o077 == 0


def test_it_outlives_its_starter(home: Path) -> None:
    text = "from hostos.image import seeding; print(seeding.start().pid)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    info = seeding.status()
    assert info is not None
    assert info.pid == int(done.stdout)


@given(st.text(max_size=30))
def test_listen_addresses(text: str) -> None:
    try:
        host, port = parse_listen(text)
    except UserError:
        return
    assert parse_listen(f"[{host}]:{port or 1}" if ":" in host else f"{host}:{port or 1}") == (host, port or 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1", ("127.0.0.1", None)),
        ("0.0.0.0:6881", ("0.0.0.0", 6881)),
        ("[::1]:6881", ("::1", 6881)),
        ("[::1]", ("::1", None)),
        ("::1", ("::1", None)),
    ],
)
def test_good_listen_addresses(text: str, expected: tuple[str, int | None]) -> None:
    assert parse_listen(text) == expected


@pytest.mark.parametrize(
    "text", ["", "localhost", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "1.2.3", "[::1]:x", "[::1"]
)
def test_bad_listen_addresses(text: str) -> None:
    with pytest.raises(UserError, match="--listen"):
        parse_listen(text)


def test_rates() -> None:
    assert [parse_rate(text) for text in ("1", "500K", "2m", "1G")] == [1, 500 << 10, 2 << 20, 1 << 30]
    for text in ("", "0", "-1", "1.5M", "9G", "fast"):
        with pytest.raises(UserError, match="rate"):
            parse_rate(text)


def test_a_machine_with_an_address_of_its_own_is_admitted_and_nobody_else(tmp_path: Path) -> None:
    """127.0.0.9 stands for this host's address on a bridge; the address a peer calls from, for the guest's."""
    bundle = put()
    info = seeding.start()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.9", info.port), 5)
    for host, guest, says in [("127.0.0.9", "box", "box"), ("192.0.2.1", "192.0.2.2", "can't listen on 192.0.2.1")]:
        with pytest.raises(UserError, match=says):
            seeding.admit(host, guest)
    seeding.admit("127.0.0.9", "127.0.0.1")
    seeding.admit("127.0.0.9", "127.0.0.1")
    now = seeding.status()
    assert now is not None
    assert (now.details["also"], now.details["admitted"]) == ([f"127.0.0.9:{info.port}"], ["127.0.0.1"])
    (tmp_path / "a").mkdir()
    fetch(bundle.torrent.magnet([f"127.0.0.9:{info.port}"]), tmp_path / "a")
