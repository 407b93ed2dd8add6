"""Images from plain web servers, with peers and without, and from servers that lie (docs/live-boot.md)."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import libtorrent as lt
import pytest

from hostos.errors import UserError
from hostos.image.exporting import export
from hostos.image.store import Store
from hostos.steps import Steps
from swarm.conftest import HERE, Daemon, Helper, Published, Start, run, wait_until
from swarm.test_faults import bundle, read_scattered

PEER, NOBODY, BAD = "127.0.0.2:7501", "127.0.0.7:7504", "127.0.0.6:7503"
WEB, OTHER = "127.0.0.9:7511", "127.0.0.9:7512"

Web = Callable[..., Helper]


@pytest.fixture(scope="module")
def exported(store: Store, published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image as `hostos image export` writes it."""
    place = tmp_path_factory.mktemp("web")
    export(store, store.get(published.image), place, Steps())
    return place


@pytest.fixture
def web(exported: Path, helpers: list[Helper]) -> Web:
    def start(address: str, how: str = "good") -> Helper:
        helpers.append(Helper.start(str(HERE / "web.py"), str(exported), address, how))
        return helpers[-1]

    return start


def test_a_swarm_of_nobody_boots(daemon: Daemon, web: Web, published: Published) -> None:
    web(WEB)
    seeds = [f"http://{WEB}"]
    with daemon.client() as client:
        answer = client.ask(
            "prepare", image=published.image, web_seeds=seeds, command=["cat", "/etc/os-release"], hold=True
        )
        done = subprocess.run(answer["argv"], capture_output=True, timeout=60, check=False)
        assert done.stdout == b"ID=swarm\nNAME=Swarm\n", done.stderr
        figures = client.ask("release", name=answer["name"])
        assert 0 < figures["fetched"] < published.layer_torrent.size / 2
        assert figures["layers"][0]["from"][0]["peer"] == f"http://{WEB}"
        # What came is in the cache: libtorrent has it, and a second boot fetches nothing.
        web_again = run(client, published.image, NOBODY, "cat", "/etc/os-release")
        assert web_again.stdout == done.stdout
        assert web_again.figures["fetched"] == 0
    assert "joining anew" not in daemon.log()


def test_every_byte_is_right(daemon: Daemon, web: Web, published: Published) -> None:
    web(WEB)
    with daemon.client() as client:
        client.ask("mount", image=published.image, web_seeds=[f"http://{WEB}"], name="all")
        assert daemon.fuse_file(published).read_bytes() == published.layer.read_bytes()
        layer = client.ask("stats", name="all")["layers"][0]
        assert layer["hash_failures"] == layer["errors"] == layer["rebuilds"] == 0
        # Each piece was asked for once.
        assert layer["downloaded"] < 1.02 * published.layer_torrent.size
        client.ask("unmount", name="all")


def test_what_came_from_the_web_is_served_to_peers(
    daemon: Daemon, web: Web, published: Published, helpers: list[Helper]
) -> None:
    web(WEB)
    with daemon.client() as client:
        client.ask("mount", image=published.image, web_seeds=[f"http://{WEB}"], name="giver", complete="on")
        size = published.layer_torrent.size
        wait_until(lambda: client.ask("stats", name="giver")["layers"][0]["verified"] == size, 60)
        second = Daemon(daemon.base.with_name(daemon.base.name + "-b"), "127.0.0.4:0")
        try:
            port = int(daemon.log().rpartition("listening on port ")[2].split()[0])
            with second.client() as other:
                peers = [f"127.0.0.3:{port}"]
                other.ask("mount", image=published.image, peers=peers, name="taker", bundle=bundle(published))
                assert read_scattered(second, published, 30)[0] == 0
                other.ask("unmount", name="taker")
        finally:
            second.stop()
            shutil.rmtree(second.base, ignore_errors=True)
        client.ask("unmount", name="giver")


@pytest.mark.parametrize("how", ["lying", "whole", "shifted", "truncated", "missing", "hanging"])
def test_a_bad_web_seed_beside_a_good_one(daemon: Daemon, web: Web, published: Published, how: str) -> None:
    web(WEB)
    web(OTHER, how)
    with daemon.client() as client:
        seeds = [f"http://{OTHER}", f"http://{WEB}"]
        client.ask("mount", image=published.image, web_seeds=seeds, bundle=bundle(published), name="mixed")
        assert read_scattered(daemon, published, 20)[0] == 0
        assert client.ask("stats", name="mixed")["layers"][0]["errors"] == 0
        client.ask("unmount", name="mixed")


def test_only_lying_web_seeds_fail_by_the_deadline(daemon: Daemon, web: Web, published: Published) -> None:
    web(WEB, "lying")
    with daemon.client() as client:
        ask = {"image": published.image, "web_seeds": [f"http://{WEB}"], "name": "bad", "deadline": 3}
        with pytest.raises(UserError, match="no web seed had image"):
            client.ask("mount", **ask)
        with pytest.raises(UserError, match="no data within 3 s.*sent wrong bytes"):
            client.ask("mount", **ask, bundle=bundle(published))


def test_web_seed_takes_over_from_a_peer_that_dies(daemon: Daemon, web: Web, seed: Start, published: Published) -> None:
    peer = seed(PEER)
    web(WEB)
    with daemon.client() as client:
        client.ask("mount", image=published.image, peers=[PEER], web_seeds=[f"http://{WEB}"], name="both")
        assert read_scattered(daemon, published, 10)[0] == 0
        peer.stop(signal.SIGKILL)
        began = time.monotonic()
        assert read_scattered(daemon, published, 40, seed=8)[0] == 0
        assert time.monotonic() - began < 30
        layer = client.ask("stats", name="both")["layers"][0]
        assert next(each for each in layer["from"] if each["peer"] == f"http://{WEB}")["downloaded"] > 0
        client.ask("unmount", name="both")


def test_peers_that_have_nothing_delay_little(
    daemon: Daemon, web: Web, published: Published, helpers: list[Helper]
) -> None:
    """Connected peers are asked first; one that never sends must not cost a second for each read."""
    web(WEB)
    empty = Daemon(daemon.base.with_name(daemon.base.name + "-e"), "127.0.0.4:0")
    try:
        with empty.client() as other, daemon.client() as client:
            other.ask("mount", image=published.image, web_seeds=[f"http://{WEB}"], name="empty")
            port = int(empty.log().rpartition("listening on port ")[2].split()[0])
            client.ask(
                "mount", image=published.image, peers=[f"127.0.0.4:{port}"], web_seeds=[f"http://{WEB}"], name="full"
            )
            began = time.monotonic()
            assert read_scattered(daemon, published, 60)[0] == 0
            assert time.monotonic() - began < 25
            client.ask("unmount", name="full")
            other.ask("unmount", name="empty")
    finally:
        empty.stop()
        shutil.rmtree(empty.base, ignore_errors=True)


def test_layers_are_web_seeds_for_other_clients(web: Web, published: Published, tmp_path: Path) -> None:
    """BEP 19, with libtorrent's own web seed client."""
    web(WEB)
    session = lt.session({"listen_interfaces": "127.0.0.4:0", "enable_dht": False, "enable_lsd": False})
    parameters = lt.load_torrent_buffer(published.layer_torrent.data)
    parameters.save_path = str(tmp_path)
    parameters.url_seeds = [f"http://{WEB}/layers/{published.layer_torrent.info_hash}/"]
    session.apply_settings({"ssrf_mitigation": False})
    handle = session.add_torrent(parameters)
    wait_until(lambda: handle.status().is_seeding, 60)
    # A finished piece is not yet in the file.
    handle.flush_cache()
    wanted = published.layer.read_bytes()
    wait_until(lambda: (tmp_path / published.layer_torrent.name).read_bytes() == wanted, 60)
    session.remove_torrent(handle)


def test_busybox_httpd_serves(daemon: Daemon, exported: Path, published: Published) -> None:
    """A web server that was not written for this."""
    busybox = shutil.which("busybox")
    if not busybox or "httpd" not in subprocess.run([busybox, "--list"], capture_output=True, text=True).stdout:
        pytest.skip("no busybox with httpd")
    server = subprocess.Popen([busybox, "httpd", "-f", "-p", OTHER, "-h", str(exported)])
    try:
        with daemon.client() as client:
            client.ask("mount", image=published.image, web_seeds=[f"http://{OTHER}"], name="busy", deadline=30)
            noise = random.Random(3)
            assert read_scattered(daemon, published, 10, seed=noise.randrange(99))[0] == 0
            client.ask("unmount", name="busy")
    finally:
        server.kill()
        server.wait()
