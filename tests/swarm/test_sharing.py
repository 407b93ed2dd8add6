"""What one client has fetched, another one gets from it, when whoever published it is gone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.live.swarm_settings import SwarmSettings
from swarm.conftest import PORT, Daemon, Lab, Published, RunSeed, daemon_on


@pytest.fixture
def other_daemon(lab: Lab) -> Iterator[Daemon]:
    """A live-boot daemon on host 3."""
    with daemon_on(lab, 3) as running:
        yield running


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("restarted", [False, True], ids=["as it came", "from an earlier run"])
def test_from_the_bare_hash_and_a_client_alone(
    restarted: bool,
    lab: Lab,
    host_seed: RunSeed,
    client_daemon: Daemon,
    other_daemon: Daemon,
    published: Published,
) -> None:
    host_seed(SwarmSettings())
    publisher, giver = f"{lab.address(1)}:{PORT}", f"{lab.address(2)}:{PORT}"
    content = digest(published.layer)
    with client_daemon.client() as client:
        client.ask("mount", image=published.image, peers=[publisher], name="all")
        assert digest(client_daemon.fuse_file(published)) == content
        client.ask("unmount", name="all")
    lab.run(0, "ip", "link", "set", "p1", "down")
    if restarted:
        client_daemon.stop()
        client_daemon.start()
    with client_daemon.client() as client, other_daemon.client() as other:
        # Nobody uses it there: nothing of it is offered.
        with pytest.raises(UserError, match="nobody had image"):
            other.ask("mount", image=published.image, peers=[giver], name="from-it", deadline=3)
        client.ask("mount", image=published.image, peers=[publisher], name="again")
        other.ask("mount", image=published.image, peers=[giver], name="from-it", deadline=30)
        assert digest(other_daemon.fuse_file(published)) == content
        assert client.ask("stats", name="again")["layers"][0]["uploaded"] >= published.layer.stat().st_size
        assert other.ask("stats", name="from-it")["layers"][0]["hash_failures"] == 0
        other.ask("unmount", name="from-it")
        client.ask("unmount", name="again")
