"""A boot is watched, the image packed in its order, and the next boot fetches ahead of its reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.image import retrace, seeding
from hostos.image.publish import publish
from hostos.image.recording import Recording, Touch, from_reads
from hostos.image.store import Store
from hostos.live.torrents import ImageBundle, image_torrent, make_image_torrent
from hostos.live.trace import Range, Trace, Workload
from hostos.steps import Steps
from swarm.conftest import Daemon, Published, run

# Read to and fro, so that neither order of paths nor read-ahead would do.
COMMAND = ("sh", "-c", "cat /var/data20 /var/data3 /var/data11 | dd of=/dev/null bs=64k status=none")


@dataclass
class Shop:
    """A store with the image in it, and a real seed. `address`: the seed's."""

    store: Store
    image: str
    address: str


@pytest.fixture(scope="module")
def shop(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    home = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSTOS_HOME", str(home))
        patch.setenv("XDG_RUNTIME_DIR", str(home))
        made = publish(published.tree, "swarm/traced", Steps()).hash
        yield Shop(Store(), made, seeding.ensure_started().address)
        seeding.stop()


@pytest.fixture(scope="module")
def traced(shop: Shop) -> str:
    base = Path(f"/tmp/hostos-swarm-trace-{os.getpid()}")
    daemon = Daemon(base, "127.0.0.3:0")
    image = shop.store.get(shop.image)
    try:
        with retrace.twin(shop.store, image, Steps()) as (twin, layout), daemon.client() as client:
            seeding.reload()
            assert run(client, twin, shop.address, *COMMAND, name="watched", trace=True).status == 0
            reads = [tuple(item) for item in client.ask("reads", name="watched")["reads"]]
    finally:
        daemon.stop()
    recorded = from_reads(COMMAND, reads, layout, 0)  # type: ignore[arg-type]
    names = [os.fsdecode(touch.path) for touch in recorded.touches if isinstance(touch, Touch)]
    data = [name for name in dict.fromkeys(names) if "data" in name]
    assert data == ["var/data20", "var/data3", "var/data11"]
    made = retrace.repack(shop.store, image, Recording((recorded,)), Steps())
    seeding.reload()
    return made


def test_the_traced_image_waits_less_often(daemon: Daemon, shop: Shop, traced: str) -> None:
    with daemon.client() as client:
        plain = run(client, shop.image, shop.address, *COMMAND)
        ahead = run(client, traced, shop.address, *COMMAND, name="ahead")
        assert plain.status == ahead.status == 0
        before, after = plain.figures["layers"][0], ahead.figures["layers"][0]  # type: ignore[index]
        assert after["prefetched"] > 30
        # Nearly all of it is read, and nothing is fetched twice.
        assert after["prefetch_used"] > 0.9 * after["prefetched"]
        assert after["wasted"] == 0
        assert after["misses"] < 0.5 * before["misses"]
        assert ahead.figures["fetched"] < 1.15 * plain.figures["fetched"]  # type: ignore[operator]
        timeline = client.ask("timeline", name="ahead")
        assert {why for _, _, why in timeline["layers"][0]["came"]} >= {"trace"}
        assert list(timeline["milestones"]) == ["metadata", "layers", "root", "started"]
        # Another command is nobody's workload: it pays for nothing.
        other = run(client, traced, shop.address, "stat", "/var/data1")
        assert other.figures["fetched"] < 300_000  # type: ignore[operator]


def test_a_trace_of_everything_delays_nobody(daemon: Daemon, shop: Shop, traced: str) -> None:
    """What a malicious image can do: have all of it fetched. Reads go first all the same."""
    bundle = shop.store.bundle(traced)
    layer = bundle.manifest.layers[0]
    blocks = -(-layer.size // 16384)
    backwards = tuple(Range(0, block, 1) for block in reversed(range(blocks)))
    hostile = Trace((Workload(("sleep", "0"), backwards),)).to_json()
    torrent, _ = make_image_torrent(bundle.manifest, [item.data for item in bundle.layers], hostile)
    path = shop.store.layer_path(layer)
    assert shop.store.add(bundle.manifest, [(bundle.layers[0], path)], hostile) == torrent.info_hash
    seeding.reload()
    with daemon.client() as client:
        done = run(client, torrent.info_hash, shop.address, "sleep", "0")
        figures = done.figures["layers"][0]  # type: ignore[index]
        assert done.status == 0
        assert figures["wait_max"] < 3.0
        assert figures["prefetched"] > 0


def test_a_malformed_trace_is_refused(daemon: Daemon, shop: Shop) -> None:
    bundle = shop.store.bundle(shop.image)
    files = {**bundle.files, "trace.json": b'{"schema":1,"kind":"hostos-trace","workloads":"all"}'}
    torrent = image_torrent(files)
    made = ImageBundle(torrent.info_hash, bundle.manifest, torrent, files, bundle.layers, None)
    fields = {"image": made.image, "peers": [shop.address], "bundle": json.loads(made.to_json()), "command": ["true"]}
    with daemon.client() as client, pytest.raises(UserError, match="boot trace"):
        client.ask("prepare", **fields)
