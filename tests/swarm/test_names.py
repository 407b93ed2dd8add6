"""Names between hosts: published by one, found, proved and booted by another; through a DHT of one's own."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from hostos.cli import live
from hostos.image import seeding
from hostos.image.publish import publish
from hostos.names import push as pushing
from hostos.names.book import Names, Person
from hostos.names.resolve import resolve
from hostos.names.serve import republish, server
from hostos.names.sources import Dht
from hostos.steps import Steps
from swarm.conftest import Daemon, Published, run

Capture = pytest.CaptureFixture[str]
ONE, TWO = "1" * 64, "2" * 64


def test_a_stranger_boots_it_by_its_name(
    daemon: Daemon,
    published: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two homes stand for two hosts; the second has nothing but a public key and two addresses."""
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "a"))
    steve = Names()
    steve.make_key()
    image = publish(published.tree, "games/own", Steps()).hash
    seed = seeding.start("127.0.0.9")
    try:
        pushing.push(image, "gaming", (seed.address,), 90)
        with server("127.0.0.9", 0, steve) as web:
            threading.Thread(target=web.serve_forever, daemon=True).start()
            monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "b"))
            key = steve.public_key()
            assert key
            Names().add(Person("steve", key, (f"http://127.0.0.9:{web.server_port}",)))
            wanted = live.resolve("steve/gaming", ())
            web.shutdown()
        assert (wanted.image, wanted.peers, wanted.bundle) == (image, (seed.address,), None)
        assert f"steve/gaming is {image} (number 1 of" in capsys.readouterr().err
        with daemon.client() as client:
            ran = run(client, wanted.image, wanted.peers[0], "cat", "/home/user/note")
        assert ran.stdout == b"mine\n"
        # With nobody there any more it is what it was.
        assert live.resolve("steve/gaming", ()).image == image
        assert "nobody was reached" in capsys.readouterr().err
    finally:
        monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "a"))
        seeding.stop()


def test_through_a_dht_of_ones_own(tmp_path: Path) -> None:
    """Three nodes on loopback; nobody else is ever asked."""
    steve, mine = Names(tmp_path / "steve"), Names(tmp_path / "mine")
    steve.make_key()
    key = steve.public_key()
    assert key
    with Dht((), "127.0.0.21:0") as first:
        end = time.monotonic() + 20
        while not first.session.listen_port() and time.monotonic() < end:
            time.sleep(0.05)
        node = f"127.0.0.21:{first.session.listen_port()}"
        with Dht((node,), "127.0.0.22:0"), Dht((node,), "127.0.0.23:0"):
            mine.add(Person("steve", key))
            steve.use_dht((node,))
            mine.use_dht((node,))
            assert pushing.push(ONE, "gaming", (), 90, steve)[1] > 0
            found = resolve("steve/gaming", mine)
            assert found is not None
            assert (found.record.image, found.asked) == (ONE, "the DHT")
            # On another host with a copy of the key the numbers go on.
            moved = Names(tmp_path / "moved")
            moved.make_key()
            (moved.root / "identity").write_text((steve.root / "identity").read_text())
            moved.use_dht((node,))
            again = pushing.push(ONE, "gaming", ("192.0.2.1:1",), 90, moved)[0]
            assert again.sequence == 2
            steve.accept(again, key, "gaming")
            # Whoever serves names puts them there again and again.
            steve.use_dht(())
            pushing.push(TWO, "gaming", (), 90, steve)
            steve.use_dht((node,))
            stop = threading.Event()
            stop.set()
            warnings: list[str] = []
            republish(steve, stop, warnings.append)
            assert warnings == []
            assert resolve("steve/gaming", mine).record.image == TWO  # type: ignore[union-attr]
            # What is put there again is never older than what is there, though libtorrent would have it taken.
            shutil.copytree(moved.root, tmp_path / "behind")
            republish(Names(tmp_path / "behind"), stop, warnings.append)
            assert len(warnings) == 1
            assert "the DHT has number 3, later than the 2 that is known here" in warnings[0]
            fresh = Names(tmp_path / "fresh")
            fresh.add(Person("steve", key))
            fresh.use_dht((node,))
            assert resolve("steve/gaming", fresh).record.image == TWO  # type: ignore[union-attr]
            # One that pushes knows of it.
            assert pushing.push(ONE, "gaming", (), 90, Names(tmp_path / "behind"))[0].sequence == 4
