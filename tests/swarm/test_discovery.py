"""Peers that nobody named, in networks of the tests' own: local discovery, a DHT, peer exchange, rate limits."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.live.swarm_settings import SwarmSettings
from swarm.conftest import HERE, PORT, Daemon, Helper, Lab, Published, RunSeed, Start, wait_until
from swarm.test_faults import bundle, read_scattered

NODE = f"{Lab.address(3)}:7700"
PUBLIC = SwarmSettings(public=True, nodes=(NODE,))
SEED, FIRST, SECOND = "127.0.0.2:7601", "127.0.0.3:0", "127.0.0.4:0"


@pytest.mark.parametrize("how", ["lan", "public"])
def test_a_bare_hash_and_nobody_named(
    lab: Lab, host_seed: RunSeed, client_daemon: Daemon, helpers: list[Helper], published: Published, how: str
) -> None:
    settings = SwarmSettings(lan=True) if how == "lan" else PUBLIC
    if how == "public":
        helpers.append(Helper.start(str(HERE / "dht_node.py"), NODE, enter=lab.enter(3)))
    host_seed(settings)
    with client_daemon.client() as client:
        ask = {"image": published.image, "name": "found", "deadline": 60}
        # Nobody is looked for unless that was asked for.
        with pytest.raises(UserError, match="no peer is known"):
            client.ask("mount", **ask)
        client.ask("mount", **ask, swarm=settings.to_dict())
        assert read_scattered(client_daemon, published, 10)[0] == 0
        layer = client.ask("stats", name="found")["layers"][0]
        # In local discovery it was the seed that called.
        assert {peer["peer"].partition(":")[0] for peer in layer["from"]} == {lab.address(1)}
        client.ask("unmount", name="found")


def test_without_discovery_nothing_but_the_named_peer_is_contacted(
    lab: Lab, host_seed: RunSeed, client_daemon: Daemon, published: Published
) -> None:
    """Counted where it can't be missed: every packet of the client's host that goes elsewhere."""
    host_seed(SwarmSettings())
    counters = [*lab.enter(2), "cat", "/proc/net/dev_mcast"]
    watch = subprocess.Popen(
        [*lab.enter(2), "python3", "-c", WATCH, lab.address(1)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert watch.stdout
    assert watch.stdout.readline() == b"ready\n"
    with client_daemon.client() as client:
        client.ask("mount", image=published.image, peers=[f"{lab.address(1)}:{PORT}"], name="named")
        assert read_scattered(client_daemon, published, 5)[0] == 0
        time.sleep(2)
        client.ask("unmount", name="named")
    others, _ = watch.communicate(b"", timeout=20)
    assert others == b"", f"{others!r} {subprocess.run(counters, capture_output=True).stdout!r}"


# Prints the destination of each IPv4 packet sent, but for those to one address; ends with its input.
WATCH = """
import select, socket, sys
packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
print("ready", flush=True)
while True:
    ready, _, _ = select.select([packets, sys.stdin], [], [])
    if sys.stdin in ready:
        break
    data, where = packets.recvfrom(65535)
    if where[2] == socket.PACKET_OUTGOING and where[1] == 0x800:
        target = socket.inet_ntoa(data[16:20])
        if target != sys.argv[1]:
            print(target, data[9], flush=True)
"""


def test_peers_learn_of_each_other_and_share(
    lab: Lab, host_seed: RunSeed, client_daemon: Daemon, published: Published
) -> None:
    """Peer exchange: both clients know only the seed, and yet serve each other."""
    # So slow that neither is done before they have heard of each other.
    slow = SwarmSettings(download_limit=200_000).to_dict()
    host_seed(SwarmSettings())
    other = Daemon(Path(f"{client_daemon.base}-b"), f"0.0.0.0:{PORT}", enter=lab.enter(3))
    try:
        with client_daemon.client() as first, other.client() as second:
            ask = {"image": published.image, "peers": [f"{lab.address(1)}:{PORT}"], "bundle": bundle(published)}
            first.ask("mount", **ask, complete="on", name="one", swarm=slow)
            second.ask("mount", **ask, complete="on", name="two", swarm=slow)

            def shared() -> int:
                figures = (first.ask("stats", name="one"), second.ask("stats", name="two"))
                return sum(int(each["layers"][0]["uploaded"]) for each in figures)

            wait_until(shared, 120)
            second.ask("unmount", name="two")
            first.ask("unmount", name="one")
    finally:
        other.stop()
        shutil.rmtree(other.base, ignore_errors=True)


def test_the_client_keeps_to_its_download_limit(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    limit = SwarmSettings(download_limit=1_000_000)
    with daemon.client() as client:
        client.ask(
            "mount", image=published.image, peers=[SEED], name="slow", bundle=bundle(published), swarm=limit.to_dict()
        )
        began = time.monotonic()
        with daemon.fuse_file(published).open("rb") as file:
            content = file.read(6_000_000)
        seconds = time.monotonic() - began
        assert content == published.layer.read_bytes()[:6_000_000]
        assert seconds > 3.0
        client.ask("unmount", name="slow")


def test_plain_text_is_refused(daemon: Daemon, seed: Start, published: Published) -> None:
    """A client that must encrypt and one that can't have nothing to say to each other."""
    seed(SEED)
    with daemon.client() as client:
        off = SwarmSettings(encryption="off").to_dict()
        client.ask("mount", image=published.image, peers=[SEED], name="plain", swarm=off)
        client.ask("unmount", name="plain")
        assert client.ask("hello")["swarm"]["encryption"] == "off"
    strict = Daemon(Path(f"{daemon.base}-strict"), SECOND)
    try:
        port = int(daemon.log().rpartition("listening on port ")[2].split()[0])
        with daemon.client() as client, strict.client() as other:
            client.ask("mount", image=published.image, peers=[SEED], name="plain", complete="on")
            with pytest.raises(UserError, match="no data within 4 s"):
                other.ask(
                    "mount",
                    image=published.image,
                    peers=[f"127.0.0.3:{port}"],
                    bundle=bundle(published),
                    name="strict",
                    deadline=4,
                )
            client.ask("unmount", name="plain")
    finally:
        strict.stop()
        shutil.rmtree(strict.base, ignore_errors=True)
