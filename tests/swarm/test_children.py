"""Images that inherit: a child's boot fetches what its parent's has not, and 64 layers are one tree."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostos.image import child, seeding
from hostos.image.entries import arrange
from hostos.image.publish import publish
from hostos.image.sources import read_directory
from hostos.image.store import Store, StoredImage
from hostos.live.acl import ACCESS, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, checked, encode
from hostos.live.manifest import MAX_LAYERS
from hostos.steps import Steps
from swarm.conftest import Daemon, Published, run


@pytest.fixture(scope="module")
def parent(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StoredImage, str]]:
    home = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSTOS_HOME", str(home))
        patch.setenv("XDG_RUNTIME_DIR", str(home))
        made = publish(published.tree, "swarm/parent", Steps()).hash
        yield Store().get(made), seeding.ensure_started().address
        seeding.stop()


def upper(directory: Path, name: str, content: bytes) -> Path:
    (directory / "var").mkdir(parents=True)
    (directory / "var" / name).write_bytes(content)
    return directory


def test_booting_a_child_fetches_only_what_is_its_own(
    daemon: Daemon, parent: tuple[StoredImage, str], tmp_path: Path
) -> None:
    image, seed = parent
    changes = upper(tmp_path / "upper", "own", b"mine\n" * 100_000)
    (changes / "home/user").mkdir(parents=True)
    subprocess.run(["mknod", changes / "home/user/note", "c", "0", "0"], check=True)
    made = child.publish_child(changes, "swarm/child", image, Steps(), only_changes=True)
    seeding.reload()
    # All of the parent's layer that the child's command reads, too.
    read = ("sh", "-c", "cat /var/data1 /var/data2 | dd of=/dev/null bs=64k status=none; ls /var >/dev/null")
    with daemon.client() as client:
        assert run(client, image.hash, seed, *read, name="parent").status == 0
        both = ("sh", "-c", read[2] + "; cat /var/own | dd of=/dev/null bs=64k status=none; ls /home/user")
        ran = run(client, made.hash, seed, *both, name="child")
    assert ran.status == 0, ran.stderr
    assert b"note" not in ran.stdout
    assert b"same" in ran.stdout  # its other name
    below, own = ran.figures["layers"]  # type: ignore[misc]
    fetched = {layer["layer"]: layer["downloaded"] for layer in (below, own)}
    assert fetched[made.layer] > 0
    # A few of the parent's blocks may not have been asked for: those of /home/user.
    assert fetched[image.manifest.layers[0].torrent] <= 4 * 65536
    assert ran.figures["fetched"] <= made.packed.size + 65536 + 4 * 65536


def test_as_many_layers_as_an_image_can_have(daemon: Daemon, parent: tuple[StoredImage, str], tmp_path: Path) -> None:
    image, seed = parent
    store = Store()
    # Each with an ACL, so that the overlay has twice as many layers.
    acl = encode(checked([(USER_OBJ, 6, 0), (USER, 4, 33), (GROUP_OBJ, 4, 0), (MASK, 4, 0), (OTHER, 0, 0)]))
    for number in range(1, MAX_LAYERS):
        tree = upper(tmp_path / f"{number}", f"n{number}", b"x")
        os.setxattr(tree / f"var/n{number}", os.fsdecode(ACCESS), acl)
        entries = arrange(read_directory(tree, Steps()), "upper")
        top = child.add_layer(
            store, image, entries, "swarm/deep", Steps(), boot=image.manifest.boot, made_by=f"step {number}"
        )
        if number > 1:
            store.remove(image.hash)
        image = store.get(top.hash)
    seeding.reload()
    assert len(image.manifest.layers) == MAX_LAYERS
    with daemon.client() as client:
        # A name as long as can be: mount(2) takes only a page of options.
        ran = run(client, image.hash, seed, "sh", "-c", "ls -ln /var", name="d" * 40, deadline=120.0)
    assert ran.status == 0, ran.stderr
    modes = {line.split()[-1]: line.split()[0] for line in ran.stdout.decode().splitlines()[1:]}
    assert {f"n{number}" for number in range(1, MAX_LAYERS)} | {"data0"} <= modes.keys()
    assert {modes[f"n{number}"] for number in range(1, MAX_LAYERS)} == {"-rw-r-----+"}
