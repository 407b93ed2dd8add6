"""The cache of the real daemon: nothing is fetched twice, and it keeps to its limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.live.client import Client
from swarm.conftest import Daemon, Published, Start, run, wait_until

SEED = "127.0.0.2:7401"


def here(client: Client) -> int:
    images = client.ask("cache")["images"]
    return int(images[0]["here"]) if images else 0


def read_all(root: str) -> None:
    for path in Path(root, "var").glob("data*"):
        path.read_bytes()


def test_a_daemon_that_starts_again_fetches_nothing_again(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    command = ("sh", "-c", "cat /var/data3 /etc/passwd | dd of=/dev/null status=none")
    with daemon.client() as client:
        first = run(client, published.image, SEED, *command)
        assert int(str(first.figures["fetched"])) > 1_000_000
        assert run(client, published.image, SEED, *command, name="again").figures["fetched"] == 0
    daemon.stop()
    daemon.start()
    with daemon.client() as client:
        again = run(client, published.image, SEED, *command, name="later")
        assert (again.status, again.figures["fetched"]) == (0, 0)


@pytest.mark.parametrize("daemon", [("--cache-limit", "20m")], indirect=True)
def test_the_limit_holds_but_never_for_what_is_mounted(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    with daemon.client() as client:
        fields = {"image": published.image, "peers": [SEED], "name": "big"}
        root = str(client.ask("mount", **fields)["root"])
        read_all(root)
        wait_until(lambda: here(client) > 20 << 20, 30)
        with pytest.raises(UserError, match="in use"):
            client.ask("prune", images=["swarm-test"])
        # Longer than it takes to look the cache over.
        wait_until(lambda: float(client.ask("list")["containers"][0]["seconds"]) > 5, 30)
        fetched = client.ask("stats", name="big")["fetched"]
        read_all(root)
        assert here(client) > 20 << 20
        assert client.ask("stats", name="big")["fetched"] == fetched
        client.ask("unmount", name="big")
        wait_until(lambda: here(client) == 0, 30)
        # Said when all of it is gone.
        wait_until(lambda: "gave up" in daemon.log(), 10)


@pytest.mark.parametrize("daemon", [("--cache-limit", "20m")], indirect=True)
def test_what_is_pinned_stays_until_it_is_named(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    with daemon.client() as client:
        root = str(client.ask("mount", image=published.image, peers=[SEED], name="big")["root"])
        assert client.ask("pin", image="swarm-test")["name"] == "swarm-test"
        read_all(root)
        client.ask("unmount", name="big")
        wait_until(lambda: float(client.ask("hello")["seconds"]) > 6, 30)
        client.ask("prune")
        assert here(client) > 20 << 20
        assert client.ask("prune", images=[published.image[:12]])["free"] > 20 << 20
        assert client.ask("cache")["images"] == []
        with pytest.raises(UserError, match="no image"):
            client.ask("pin", image="swarm-test")


@pytest.mark.parametrize("daemon", [("--complete", "on")], indirect=True)
def test_the_rest_comes_while_nobody_reads(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    with daemon.client() as client:
        client.ask("mount", image=published.image, peers=[SEED], name="whole")
        layer = lambda: client.ask("stats", name="whole")["layers"][0]  # noqa: E731
        wait_until(lambda: layer()["verified"] == layer()["size"], 40)
        # The last piece is padded on the wire.
        assert layer()["downloaded"] < layer()["size"] + 65536
        assert layer()["wasted"] == 0
        client.ask("unmount", name="whole")


def test_the_rest_can_be_asked_for_and_rationed(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    with daemon.client() as client:
        client.ask("mount", image=published.image, peers=[SEED], name="slow", complete="2M")
        wait_until(lambda: float(client.ask("list")["containers"][0]["seconds"]) > 4, 30)
        verified = client.ask("stats", name="slow")["layers"][0]["verified"]
        assert 3_000_000 < verified < 10_000_000
        with pytest.raises(UserError, match="the rest"):
            client.ask("mount", image=published.image, peers=[SEED], name="x", complete="much")
        client.ask("unmount", name="slow")
