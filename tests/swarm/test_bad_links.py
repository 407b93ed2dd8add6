"""What a link can do to a boot, between hosts of the tests' own: go away, lose packets."""

from __future__ import annotations

import threading
import time

import pytest

from hostos.live.swarm_settings import SwarmSettings
from swarm.conftest import HERE, PORT, Daemon, Helper, Lab, Published, RunSeed
from swarm.test_faults import bundle, read_scattered

HERE_WIRE, THERE_WIRE = "198.18.8.1", "198.18.8.2"


@pytest.mark.parametrize("cut", ["p1", "p2"], ids=["of the seed", "of the client"])
def test_link_drops_and_comes_back(
    cut: str,
    lab: Lab,
    host_seed: RunSeed,
    client_daemon: Daemon,
    published: Published,
) -> None:
    host_seed(SwarmSettings())
    with client_daemon.client() as client:
        peers = [f"{lab.address(1)}:{PORT}"]
        client.ask("mount", image=published.image, peers=peers, name="cut", read_deadline=60)
        assert read_scattered(client_daemon, published, 5)[0] == 0
        lab.run(0, "ip", "link", "set", cut, "down")
        results: list[tuple[int, float]] = []
        reader = threading.Thread(target=lambda: results.append(read_scattered(client_daemon, published, 20, seed=9)))
        reader.start()
        time.sleep(6.0)
        assert reader.is_alive(), "everything had been read before the link was cut: nothing was tested"
        lab.run(0, "ip", "link", "set", cut, "up")
        reader.join(50)
        assert results, "the read never ended"
        assert results[0][0] == 0
        assert client.ask("stats", name="cut")["layers"][0]["errors"] == 0
        client.ask("unmount", name="cut")


def test_a_third_of_the_packets_are_lost(
    lab: Lab,
    host_seed: RunSeed,
    client_daemon: Daemon,
    published: Published,
    helpers: list[Helper],
) -> None:
    names = [f"{lab.mark}-{host}" for host in (1, 2)]
    helpers.append(Helper.start(str(HERE / "lossy.py"), names[0], HERE_WIRE, names[1], THERE_WIRE, "0.3"))
    host_seed(SwarmSettings())
    with client_daemon.client() as client:
        ask = {"image": published.image, "peers": [f"{HERE_WIRE}:{PORT}"], "bundle": bundle(published)}
        client.ask("mount", **ask, name="lossy", deadline=50, read_deadline=55)
        wrong, _ = read_scattered(client_daemon, published, 1)
        assert wrong == 0
        layer = client.ask("stats", name="lossy")["layers"][0]
        assert layer["hash_failures"] == layer["errors"] == 0
        client.ask("unmount", name="lossy")
