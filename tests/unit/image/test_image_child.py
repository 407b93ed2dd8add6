"""Children share their parents' layers; their trees are what they should be."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.image import child, family, overlay
from hostos.image.entries import arrange
from hostos.image.layers import read_image
from hostos.image.publish import publish
from hostos.image.sources import read_directory
from hostos.image.store import Store, StoredImage
from hostos.live.manifest import MAX_LAYERS, BootConfig, Layer, Manifest
from hostos.steps import Steps

pytestmark = pytest.mark.skipif(not shutil.which("tar2sqfs"), reason="needs tar2sqfs and sqfs2tar (squashfs-tools-ng)")


def copy(tree: Path, to: Path) -> Path:
    subprocess.run(["cp", "-a", tree, to], check=True)
    return to


def changed(tree: Path, to: Path) -> Path:
    """A tree in which something was added, changed, removed and linked."""
    copy(tree, to)
    (to / "etc/new").write_text("new\n")
    (to / "etc/motd").write_text("changed\n")
    (to / "link").unlink()
    (to / "empty").rmdir()
    (to / "empty").write_text("a file now\n")
    return to


def listing(tree: overlay.Tree) -> list[tuple[object, ...]]:
    rows = []
    for e in tree.entries():
        data = e.read(e.size) if e.is_file else b""
        rows.append((e.path, e.mode, e.uid, e.gid, e.mtime, e.size, e.target, e.link, e.xattrs, data))
    return rows


@pytest.fixture
def parent(home: Path, tree: Path) -> StoredImage:
    return Store().get(publish(tree, "test/parent", Steps(), boot=BootConfig(("/bin/prog",))).hash)


def test_a_child_is_its_parents_layers_and_what_differs(parent: StoredImage, tree: Path, tmp_path: Path) -> None:
    store = Store()
    whole = changed(tree, tmp_path / "changed")
    made = store.get(child.publish_child(whole, "test/child", parent, Steps()).hash)
    assert made.manifest.layers[:1] == parent.manifest.layers
    assert made.manifest.parents == (parent.hash,)
    assert made.manifest.boot == parent.manifest.boot
    assert made.manifest.architecture == "x86_64"
    # 300 kB of the parent are not in it.
    assert made.manifest.layers[1].size < 8192
    with ExitStack() as stack:
        expected = overlay.merge([arrange(read_directory(whole, Steps()), "tree")])
        assert listing(read_image(store, made, stack, Steps())) == listing(expected)
    assert sorted(child.diff(store, made, None, Steps())) == [
        ("A", b"etc/new"), ("C", b"empty"), ("C", b"etc/motd"), ("C", b"etc/motd.again"), ("D", b"link"),
    ]  # fmt: skip
    assert child.diff(store, made, made, Steps()) == []
    # Again: the same hash.
    assert child.publish_child(whole, "test/child", parent, Steps()).hash == made.hash


def test_a_removed_parent_leaves_its_layers_to_its_child(parent: StoredImage, tree: Path, tmp_path: Path) -> None:
    store = Store()
    made = child.publish_child(changed(tree, tmp_path / "c"), "test/child", parent, Steps()).hash
    store.remove(parent.hash)
    assert not store.get(made).missing
    store.remove(made)
    assert list(store.layers_dir.iterdir()) == []


def test_only_changes_as_an_overlay_has_them(parent: StoredImage, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make whiteouts here")
    upper = tmp_path / "upper"
    (upper / "etc").mkdir(parents=True)
    os.setxattr(upper / "etc", "trusted.overlay.opaque", b"y")
    (upper / "etc/only").write_text("x")
    os.mknod(upper / "link", 0o020000, os.makedev(0, 0))
    store = Store()
    made = store.get(child.publish_child(upper, "test/upper", parent, Steps(), only_changes=True).hash)
    with ExitStack() as stack:
        tree = read_image(store, made, stack, Steps())
        paths = [entry.path for entry in tree.entries()]
    assert b"link" not in paths
    assert [path for path in paths if path.startswith(b"etc")] == [b"etc", b"etc/only"]
    assert b"usr/bin/prog" in paths


def test_squashing_keeps_the_tree(parent: StoredImage, tree: Path, tmp_path: Path) -> None:
    store = Store()
    one = store.get(child.publish_child(changed(tree, tmp_path / "1"), "test/1", parent, Steps()).hash)
    second = copy(tmp_path / "1", tmp_path / "2")
    (second / "etc/new").unlink()
    (second / "etc/newer").write_text("newer\n")
    two = store.get(child.publish_child(second, "test/2", one, Steps()).hash)
    assert two.manifest.parents == (one.hash, parent.hash)
    flat = store.get(child.squash(store, two, Steps(), name="test/flat").hash)
    short = store.get(child.squash(store, two, Steps(), down_to=parent).hash)
    assert len(flat.manifest.layers) == 1
    assert flat.manifest.parents == ()
    assert short.manifest.layers[0] == parent.manifest.layers[0]
    assert len(short.manifest.layers) == 2
    with ExitStack() as stack:
        trees = [listing(read_image(store, image, stack, Steps())) for image in (two, flat, short)]
    assert trees[0] == trees[1] == trees[2]
    # What came and went between is in neither.
    assert family.brought_by(two, store.images()) == [parent.hash, one.hash, two.hash]
    assert {image.name for image in family.children(parent, store.images())} == {"test/1", "test/2"}
    with pytest.raises(UserError, match="nothing to squash"):
        child.squash(store, flat, Steps())
    with pytest.raises(UserError, match="is not made from"):
        child.squash(store, two, Steps(), down_to=flat)


def test_what_a_child_can_not_be(parent: StoredImage, tree: Path, tmp_path: Path) -> None:
    store = Store()
    before = [image.hash for image in store.images()]
    with pytest.raises(UserError, match="nothing to publish"):
        child.publish_child(tree, "test/same", parent, Steps())
    other = copy(tree, tmp_path / "arm")
    (other / "usr/bin/arm").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 3, 183, 1))
    (other / "usr/bin/arm").chmod(0o755)
    with pytest.raises(UserError, match="programs for aarch64, but its parent test/parent is for x86_64"):
        child.publish_child(other, "test/arm", parent, Steps())
    with pytest.raises(UserError, match="at most 64") as told:
        child.check_depth(MAX_LAYERS + 1, "deep")
    assert "squash deep" in told.value.hint
    with pytest.raises(UserError, match="no image"):
        store.get("0" * 64)
    assert [image.hash for image in store.images()] == before
    assert list(store.incoming_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"parents": ["xyz"]}, "parent is not 64"),
        ({"parents": ["0" * 64] * 2}, "listed twice"),
        ({"parents": "0" * 64}, "not a list"),
        ({"history": ["one", "two"]}, "not that of its layers"),
        ({"history": ["x" * 2000]}, "longer than"),
        ({"history": [3]}, "not a string"),
    ],
)
def test_a_manifests_family_is_checked(wrong: dict[str, object], why: str) -> None:
    plain = Manifest("n/ame", "x86_64", (Layer("1" * 64, 1, f"hostos-{'0' * 16}.squashfs"),))
    assert b"parents" not in plain.to_json()
    whole = Manifest(plain.name, plain.architecture, plain.layers, parents=("2" * 64,), history=("made",))
    assert Manifest.parse(whole.to_json()) == whole
    with pytest.raises(UserError, match=why):
        Manifest.parse(json.dumps({**json.loads(plain.to_json()), **wrong}).encode())


def test_the_command_line(home: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hostos.cli import main

    def run(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["image", *map(str, words)])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    assert run("publish", tree, "--name", "os/base")[0] == 0
    status, out, err = run(
        "publish", changed(tree, tmp_path / "c"), "--name", "os/child", "--from", "os/base", "--env", "A=b"
    )
    assert status == 0
    hash = out.strip()
    assert len(hash) == 64
    assert "in 2 layers" in err
    drawn = run("tree")[1].splitlines()
    assert drawn[0].startswith("os/base  ")
    assert drawn[1].startswith(f"└── os/child  {hash[:16]}")
    rows = run("history", "os/child")[1].splitlines()
    assert [row.split()[3] for row in rows] == ["os/child", "os/base"]
    assert "D /link" in run("diff", "os/child")[1].splitlines()
    assert "parent:" in run("inspect", "os/child")[1]
    assert run("squash", "os/child", "--name", "os/flat")[0] == 0
    status, _, err = run("publish", tree, "--name", "x", "--changes")
    assert (status, "--from IMAGE" in err) == (2, True)
    status, _, err = run("publish", tree, "--name", "x", "--from", "os/nobody")
    assert (status, "no image 'os/nobody'" in err) == (2, True)
