"""Live boot from IPFS: real gateways of the test's own, good and bad, the real daemon, FUSE, overlay and nspawn."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ipfs import Store, base32, binary

from hostos.errors import UserError
from hostos.live.client import Client
from swarm.conftest import HERE, Daemon, Helper, Published, publish, run
from swarm.test_live_boot import describe

pytestmark = pytest.mark.swarm


@dataclass(frozen=True)
class Blocks:
    """A directory with the blocks of one image in three forms: as published, its squashfs, its plain tree."""

    directory: Path
    image: str
    file: str
    tree: str
    bare_tree: str


@pytest.fixture(scope="session")
def blocks(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    store = Store()
    layer = store.file(published.layer.read_bytes())
    files = {path: store.file(data) for path, data in published.bundle.files.items()}
    layers = store.directory({"0.squashfs": layer, "0.torrent": files["layers/0.torrent"]})
    image = store.directory({"manifest.json": files["manifest.json"], "layers": layers})
    tree = store.tree(published.tree)
    bare = store.tree(published.tree, attributed=False)
    directory = tmp_path_factory.mktemp("ipfs") / "blocks"
    directory.mkdir()
    for name, block in store.blocks.items():
        (directory / base32(name)).write_bytes(block)
    return Blocks(directory, base32(image[0]), base32(layer[0]), base32(tree[0]), base32(bare[0]))


Gateway = Callable[..., Helper]


@pytest.fixture
def gateway(blocks: Blocks, helpers: list[Helper]) -> Iterator[Gateway]:
    """Starts a gateway at `HOST:PORT` that behaves as told."""

    def start(address: str, how: str = "good") -> Helper:
        helpers.append(Helper.start(str(HERE / "gateway.py"), str(blocks.directory), address, how))
        return helpers[-1]

    yield start
    for log in blocks.directory.parent.glob("asked-*"):
        log.unlink()


GOOD, OTHER, THIRD = "127.0.0.2:7201", "127.0.0.2:7202", "127.0.0.2:7203"


def urls(*addresses: str) -> list[str]:
    return [f"http://{address}" for address in addresses]


def boot(client: Client, image: str, *command: str, gateways: list[str], **fields: Any) -> Any:
    import subprocess

    answer = client.ask("prepare", image=image, gateways=gateways, command=list(command), hold=True, **fields)
    done = subprocess.run(answer["argv"], capture_output=True, timeout=60, check=False)
    return done, client.ask("release", name=answer["name"])


@pytest.mark.parametrize("form", ["image", "file"])
def test_the_tree_equals_its_source(
    daemon: Daemon, gateway: Gateway, blocks: Blocks, published: Published, form: str
) -> None:
    gateway(GOOD)
    with daemon.client() as client:
        mounted = client.ask("mount", image=getattr(blocks, form), gateways=urls(GOOD), name="tree")
        assert describe(Path(mounted["root"])) == describe(published.tree)
        figures = client.ask("unmount", name="tree")["layers"][0]
        assert (figures["hash_failures"], figures["errors"]) == (0, 0)
        assert figures["downloaded"] <= 1.01 * figures["size"]
        # Everything is here now: it is read once more with nobody to ask.
        again = client.ask("mount", image=getattr(blocks, form), gateways=urls("127.0.0.2:1"), name="tree")
        assert describe(Path(again["root"])) == describe(published.tree)
        assert client.ask("unmount", name="tree")["layers"][0]["downloaded"] == 0
    assert [point for point in daemon.mounts() if not point.endswith("/fuse")] == []


def test_a_command_fetches_what_it_reads(daemon: Daemon, gateway: Gateway, blocks: Blocks) -> None:
    gateway(GOOD)
    with daemon.client() as client:
        done, figures = boot(client, blocks.image, "sh", "-c", "echo out; exit 7", gateways=urls(GOOD))
        assert (done.returncode, done.stdout) == (7, b"out\n"), done.stderr
        assert figures["image_name"] == "swarm-test"
        assert 0 < figures["fetched"] < 0.3 * figures["size"]
        _, again = boot(client, blocks.image, "sh", "-c", "exit 0", gateways=urls(GOOD))
        assert again["fetched"] == 0


def test_a_plain_tree_with_modes(daemon: Daemon, gateway: Gateway, blocks: Blocks, published: Published) -> None:
    gateway(GOOD)
    with daemon.client() as client:
        root = Path(client.ask("mount", image=blocks.tree, gateways=urls(GOOD), name="tree")["root"])
        there, source = describe(root), describe(published.tree)
        for name, facts in source.items():
            mode, uid, _, mtime, device, size, content, _, _ = facts
            if device:
                assert name not in there  # UnixFS has no devices
                continue
            assert there[name][5:7] == (size, content), name
            assert there[name][1] == 0, name
            if content is None or not isinstance(content, str) or len(content) == 64:
                assert (there[name][0], there[name][3]) == (mode, mtime), name
            assert uid in (0, 1000)
        client.ask("unmount", name="tree")


def test_a_plain_tree_is_booted_with_private_users(daemon: Daemon, gateway: Gateway, blocks: Blocks) -> None:
    gateway(GOOD)
    script = "cat /proc/self/uid_map; stat -c '%u %a' /usr/bin /home/user/note; "
    script += "echo new > /home/user/note; cat /home/user/note"
    with daemon.client() as client:
        for tree, mode in ((blocks.tree, "644"), (blocks.bare_tree, "755")):
            done, figures = boot(client, tree, "/bin/sh", "-c", script, gateways=urls(GOOD))
            lines = done.stdout.decode().splitlines()
            assert lines[1:] == ["0 755", f"0 {mode}", "new"], done
            assert int(lines[0].split()[1]) >= 524288
            assert 0 < figures["fetched"] < 0.5 * figures["size"]
    assert not [point for point in daemon.mounts() if not point.endswith("/fuse")]


@pytest.mark.parametrize("bad", ["lying", "truncated", "html", "missing", "hanging", "oversized", "slow:20000"])
def test_one_bad_gateway_among_two(
    daemon: Daemon, gateway: Gateway, blocks: Blocks, published: Published, bad: str
) -> None:
    gateway(GOOD)
    gateway(OTHER, bad)
    with daemon.client() as client:
        began = time.monotonic()
        root = Path(client.ask("mount", image=blocks.image, gateways=urls(OTHER, GOOD), name="tree")["root"])
        assert (root / "var/data3").read_bytes() == (published.tree / "var/data3").read_bytes()
        seconds = time.monotonic() - began
        figures = client.ask("unmount", name="tree")["layers"][0]
        print(f"{bad} beside a good one: 1 MB and the metadata in {seconds:.2f} s, {figures['wasted']} bytes wasted")
        assert figures["errors"] == 0
        assert seconds < 15


@pytest.mark.parametrize("bad", ["lying", "truncated", "html", "hanging"])
def test_only_bad_gateways_end_at_the_deadline(daemon: Daemon, gateway: Gateway, blocks: Blocks, bad: str) -> None:
    gateway(GOOD, bad)
    began = time.monotonic()
    with daemon.client() as client, pytest.raises(UserError) as refused:
        client.ask("mount", image=blocks.image, gateways=urls(GOOD), name="tree", deadline=2.0)
    assert time.monotonic() - began < 5
    assert GOOD in refused.value.message
    why = {"lying": "wrong bytes", "truncated": "in the middle", "html": "text/html", "hanging": "no data within 2 s"}
    assert why[bad] in refused.value.message


def test_a_gateway_that_turns_bad_while_reading(daemon: Daemon, gateway: Gateway, blocks: Blocks) -> None:
    good = gateway(GOOD)
    with daemon.client() as client:
        mounted = client.ask("mount", image=blocks.image, gateways=urls(GOOD), name="tree", read_deadline=1.0)
        root = Path(mounted["root"])
        good.stop()
        began = time.monotonic()
        with pytest.raises(OSError, match="Input/output error"):
            (root / "var/data9").read_bytes()
        assert time.monotonic() - began < 60
        figures = client.ask("stats", name="tree")["layers"][0]
        assert figures["errors"] > 0
        assert "refused" in figures["last_error"]
        gateway(GOOD)
        assert len((root / "var/data10").read_bytes()) == 1_000_000
        client.ask("unmount", name="tree")


def test_random_ranges_while_a_third_of_the_answers_is_wrong(
    daemon: Daemon, gateway: Gateway, blocks: Blocks, published: Published
) -> None:
    gateway(GOOD)
    gateway(OTHER, "lying:0.3")
    gateway(THIRD, "slow:400000")
    source = published.layer.read_bytes()
    with daemon.client() as client:
        client.ask("mount", image=blocks.file, gateways=urls(OTHER, THIRD, GOOD), name="tree")
        file = daemon.base / "mounts/fuse" / blocks.file
        dice = random.Random(3)
        ranges = [(dice.randrange(len(source)), dice.randrange(1, 200_000)) for _ in range(400)]

        def wrong(place: tuple[int, int]) -> bool:
            with file.open("rb") as opened:
                opened.seek(place[0])
                return opened.read(place[1]) != source[place[0] : sum(place)]

        with ThreadPoolExecutor(16) as threads:
            assert sum(threads.map(wrong, ranges)) == 0
        figures = client.ask("unmount", name="tree")["layers"][0]
    assert figures["errors"] == 0


def test_damage_in_the_cache_is_noticed(daemon: Daemon, gateway: Gateway, blocks: Blocks, published: Published) -> None:
    gateway(GOOD)
    with daemon.client() as client:
        root = Path(client.ask("mount", image=blocks.image, gateways=urls(GOOD), name="tree")["root"])
        assert (root / "var/data1").read_bytes() == (published.tree / "var/data1").read_bytes()
        client.ask("unmount", name="tree")
    daemon.stop()
    spoiled = 0
    for file in (daemon.base / "cache/blocks").glob("*/*"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        spoiled += 1
    assert spoiled > 15
    daemon.start()
    with daemon.client() as client:
        root = Path(client.ask("mount", image=blocks.image, gateways=urls(GOOD), name="tree")["root"])
        assert (root / "var/data1").read_bytes() == (published.tree / "var/data1").read_bytes()
        client.ask("unmount", name="tree")


@pytest.mark.parametrize("daemon", [("--cache-size", "3m")], indirect=True)
def test_a_full_cache_makes_room(daemon: Daemon, gateway: Gateway, blocks: Blocks, published: Published) -> None:
    gateway(GOOD)
    with daemon.client() as client:
        root = Path(client.ask("mount", image=blocks.image, gateways=urls(GOOD), name="tree")["root"])
        for number in range(24):
            name = f"var/data{number}"
            assert (root / name).read_bytes() == (published.tree / name).read_bytes()
        assert client.ask("unmount", name="tree")["layers"][0]["errors"] == 0


def test_what_is_no_image_is_refused(daemon: Daemon, gateway: Gateway, blocks: Blocks) -> None:
    gateway(GOOD)
    store = Store()
    cases = {
        "no squashfs": store.file(b"just text\n" * 50),
        "compressed with gzip": store.file(b"\x1f\x8b" + bytes(500)),
        "none of them bin": store.directory({"readme": store.file(b"x")}),
        "symbolic link": store.symlink("elsewhere"),
        "manifest": store.directory({"manifest.json": store.file(b"{}"), "layers": store.directory({})}),
        "cut off": store.file(b"hsqs" + bytes(36) + (10**9).to_bytes(8, "little") + bytes(1000)),
    }
    for name, block in store.blocks.items():
        (blocks.directory / base32(name)).write_bytes(block)
    with daemon.client() as client:
        for why, (name, _) in cases.items():
            with pytest.raises(UserError, match=why):
                client.ask("inspect", image=base32(name), gateways=urls(GOOD))
        with pytest.raises(UserError, match="SHA-1"):
            client.ask("inspect", image=base32(binary(0x70, bytes(20), 0x11)), gateways=urls(GOOD))
        for wrong in ({"gateways": []}, {"gateways": urls(GOOD), "peers": ["127.0.0.1:1"]}, {"gateways": ["ftp://x"]}):
            with pytest.raises(UserError):
                client.ask("inspect", image=blocks.image, **wrong)


def test_an_image_of_two_sources_at_once(
    daemon: Daemon, gateway: Gateway, seed: Any, blocks: Blocks, published: Published
) -> None:
    """The same image by hash from peers and by CID from gateways: neither disturbs the other."""
    gateway(GOOD)
    seed("127.0.0.2:7101")
    with daemon.client() as client:
        by_cid = Path(client.ask("mount", image=blocks.image, gateways=urls(GOOD), name="cid")["root"])
        by_hash = Path(client.ask("mount", image=published.image, peers=["127.0.0.2:7101"], name="hash")["root"])
        assert describe(by_cid / "etc") == describe(by_hash / "etc") == describe(published.tree / "etc")
        assert run(client, published.image, "127.0.0.2:7101", "sh", "-c", "exit 0").status == 0
        client.ask("unmount", name="cid")
        client.ask("unmount", name="hash")


def test_publish_is_used(tmp_path: Path) -> None:
    assert publish
    assert shutil.which("mksquashfs")
