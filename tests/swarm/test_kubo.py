"""Live boot from a real IPFS node: what Kubo adds in any of its ways is read byte for byte."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.image import ipfs
from hostos.image import publish as publishing
from hostos.image.store import Store
from hostos.steps import Steps, Talk
from swarm import kubo
from swarm.conftest import Daemon, Published
from swarm.test_ipfs import boot
from swarm.test_live_boot import describe


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kubo.Kubo]:
    program = kubo.find()
    if program is None:
        pytest.skip("there is no Kubo here: docs/ipfs.md says how to build it")
    running = kubo.Kubo(program, tmp_path_factory.mktemp("kubo"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def store(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    boot_config = publishing.boot_config(command="sh -c 'echo published; id -u'")
    publishing.publish(published.tree, "kubo/test", Steps(Talk()), boot=boot_config, store=store)
    return store


def test_published_and_booted(daemon: Daemon, node: kubo.Kubo, store: Store, published: Published) -> None:
    image = store.get("kubo/test")
    cid = ipfs.add(store, image, node.api, Steps(Talk()))
    assert ipfs.recorded(image) == cid
    assert cid in node.run("pin", "ls", "--type=recursive", "--quiet")
    assert ipfs.add(store, image, node.api, Steps(Talk())) == cid
    with daemon.client() as client:
        manifest = client.manifest(cid, gateways=[node.gateway])
        assert (manifest["name"], manifest["boot"]["command"][0]) == ("kubo/test", "sh")
        done, figures = boot(client, cid, gateways=[node.gateway])
        assert done.stdout == b"published\n0\n", done
        assert 0 < figures["fetched"] < 0.3 * figures["size"]
        root = Path(client.ask("mount", image=cid, gateways=[node.gateway], name="all")["root"])
        assert describe(root) == describe(published.tree)
        client.ask("unmount", name="all")


@pytest.mark.parametrize(
    "options",
    [
        (),  # CIDv0, dag-pb leaves of 256 KiB
        ("--cid-version=1", "--chunker=size-1048576"),
        ("--trickle", "--raw-leaves"),
        ("--chunker=rabin-20000-60000-100000",),
    ],
)
def test_a_squashfs_file_however_it_was_added(
    daemon: Daemon, node: kubo.Kubo, published: Published, options: tuple[str, ...]
) -> None:
    cid = node.run("add", "--quieter", *options, str(published.layer))
    assert cid.startswith("Qm" if "--cid-version=1" not in options else "bafy")
    with daemon.client() as client:
        root = Path(client.ask("mount", image=cid, gateways=[node.gateway], name="file")["root"])
        name = "var/data7"
        assert (root / name).read_bytes() == (published.tree / name).read_bytes()
        client.ask("unmount", name="file")


def test_a_tree_with_large_directories_and_modes(
    daemon: Daemon, node: kubo.Kubo, published: Published, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    subprocess.run(["cp", "-a", str(published.tree), str(tree)], check=True)
    (tree / "var/null").unlink()  # UnixFS has no devices
    many = tree / "usr/share/many"
    many.mkdir(parents=True)
    for number in range(5000):
        (many / f"a file with a rather long name, number {number:05}").write_text(str(number))
    (tree / "usr/bin/id").chmod(0o4755)
    os.utime(tree / "etc/passwd", (1_600_000_000, 1_600_000_000))
    cid = node.run("add", "--quieter", "-r", "--preserve-mode", "--preserve-mtime", "--hidden", str(tree))
    with daemon.client() as client:
        root = Path(client.ask("mount", image=cid, gateways=[node.gateway], name="tree")["root"])
        found = root / "usr/share/many"
        assert len(list(found.iterdir())) == 5000
        assert (found / "a file with a rather long name, number 04321").read_text() == "4321"
        assert not (found / "nothing").exists()
        assert (root / "usr/bin/id").stat().st_mode == 0o104755
        assert (root / "etc/passwd").stat().st_mtime == 1_600_000_000
        assert (root / "bin").readlink() == Path("usr/bin")
        for file in ("usr/bin/id", "var/data3", "home/user/hole"):
            assert hashlib.sha256((root / file).read_bytes()).digest() == digest(tree / file)
        client.ask("unmount", name="tree")
        done, _ = boot(client, cid, "/bin/sh", "-c", "cat /etc/os-release; id -u", gateways=[node.gateway])
        assert done.stdout == b"ID=swarm\nNAME=Swarm\n0\n", done


def digest(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def test_what_is_no_node_or_refuses_is_named(node: kubo.Kubo, store: Store) -> None:
    image = store.get("kubo/test")
    with pytest.raises(UserError, match="no IPFS node answers"):
        ipfs.add(store, image, "http://127.0.0.1:1", Steps(Talk()))
    with pytest.raises(UserError, match="not the RPC API"):
        ipfs.check(node.gateway)
    with pytest.raises(UserError, match="--ipfs-api"):
        ipfs.check("127.0.0.1:5001")
    assert ipfs.check(node.api)
