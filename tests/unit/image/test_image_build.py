"""Recipes are built in a real sandbox: cached by content, reproducible, nothing published when a step fails."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.image import builder, overlay, recipe_lock, sandbox, verifying
from hostos.image.importing import bill
from hostos.image.layers import read_image
from hostos.image.store import Store, StoredImage
from hostos.live.acl import (
    ACCESS,
    DEFAULT,
    GROUP_OBJ,
    MASK,
    OTHER,
    USER,
    USER_OBJ,
    checked,
    decode,
    encode,
)  # fmt: skip
from hostos.steps import Steps

pytestmark = pytest.mark.skipif(not shutil.which("tar2sqfs"), reason="needs tar2sqfs (squashfs-tools-ng)")

RECIPE = """
name = "test/built"
source-date-epoch = 1700000000
[base]
directory = "tree"

[[step]]
copy = "site"
to = "/srv/site"
[[step]]
env = {GREETING = "hello"}
[[step]]
run = [
  "echo $GREETING > /etc/greeting",
  "id -u > /etc/who",
  "rm -rf /usr/share/gone; mkdir /usr/share/gone; echo x > /usr/share/gone/new",
  "mv /usr/share/renamed /usr/share/other",
  "echo left > /tmp/left; echo left > /run/left",
  "chown 33:33 /etc/greeting; chmod 4755 /etc/greeting",
  "touch /etc/later",
]
[boot]
command = ["cat", "/etc/greeting"]
"""


@pytest.fixture
def place(workshop: Path) -> Path:
    """A recipe over a tree with a shell in it."""
    (workshop / "site").mkdir()
    (workshop / "site/index.html").write_text("hello\n")
    (workshop / "r.toml").write_text(RECIPE)
    return workshop


def tree_of(image: StoredImage, stack: ExitStack) -> overlay.Tree:
    return read_image(Store(), image, stack, Steps())


def content(tree: overlay.Tree, path: bytes) -> bytes:
    node = tree.root.find(path)
    assert node is not None, path
    return node.entry.read(1 << 16)


def test_steps_become_layers_and_are_kept(place: Path) -> None:
    made = builder.build(place / "r.toml", "", Steps(), builder.Options())
    assert (made.steps, made.cached) == (2, 0)
    image = made.image
    assert [text.split()[0] for text in image.manifest.history] == ["base", "copy", "run"]
    assert dict(image.manifest.boot.env) == {"GREETING": "hello"}
    with ExitStack() as stack:
        tree = tree_of(image, stack)
        paths = {entry.path for entry in tree.entries()}
        assert content(tree, b"etc/greeting") == b"hello\n"
        assert content(tree, b"etc/who") == b"0\n"
        assert content(tree, b"srv/site/index.html") == b"hello\n"
        greeting = tree.root.find(b"etc/greeting").entry  # type: ignore[union-attr]
        assert (greeting.uid, greeting.gid, stat.S_IMODE(greeting.mode)) == (33, 33, 0o4755)
        assert greeting.mtime == 1_700_000_000
        assert {b"usr/share/gone/new", b"usr/share/other/kept"} <= paths
        assert not {b"usr/share/gone/old", b"usr/share/renamed", b"tmp/left", b"run/left", b"dev", b"proc"} & paths
    again = builder.build(place / "r.toml", "", Steps(), builder.Options(locked=True))
    assert again.image.hash == image.hash
    assert (again.steps, again.cached) == (2, 2)
    # Only what comes after a change is made again; the layers before it are the same.
    (place / "r.toml").write_text(RECIPE.replace('"touch /etc/later"', '"touch /etc/even-later"'))
    changed = builder.build(place / "r.toml", "", Steps(), builder.Options())
    assert (changed.steps, changed.cached) == (2, 1)
    assert changed.image.manifest.layers[:2] == image.manifest.layers[:2]
    assert changed.image.hash != image.hash
    # Contents count, not times.
    os.utime(place / "site/index.html", (1, 1))
    assert builder.build(place / "r.toml", "", Steps(), builder.Options()).cached == 2
    (place / "site/index.html").write_text("other\n")
    assert builder.build(place / "r.toml", "", Steps(), builder.Options()).cached == 0


def test_an_archive_is_packed_once(place: Path) -> None:
    subprocess.run(["tar", "-cf", place / "tree.tar", "-C", place / "tree", "."], check=True)
    recipe = place / "tar.toml"
    recipe.write_text('name = "test/tar"\nsource-date-epoch = 1700000000\nbase.tar = "tree.tar"\n')
    made = builder.build(recipe, "", Steps(), builder.Options())
    assert (made.steps, made.cached) == (1, 0)
    again = builder.build(recipe, "", Steps(), builder.Options(update=True))
    assert (again.steps, again.cached, again.image.hash) == (1, 1, made.image.hash)
    # By what is in it.
    (place / "tree/more").write_text("x")
    subprocess.run(["tar", "-rf", place / "tree.tar", "-C", place / "tree", "./more"], check=True)
    assert builder.build(recipe, "", Steps(), builder.Options()).cached == 0
    assert builder.build(recipe, "", Steps(), builder.Options(fresh=True)).cached == 0


def test_the_same_recipe_gives_the_same_hash_again(place: Path) -> None:
    made = builder.build(place / "r.toml", "", Steps(), builder.Options()).image
    lock = recipe_lock.path_of(place / "r.toml").read_bytes()
    assert verifying.verify(place / "r.toml", "", Steps()) == made.hash
    assert recipe_lock.path_of(place / "r.toml").read_bytes() == lock
    assert b'"components":[]' in bill(made.hash, Steps())
    # A step that depends on the clock is found out, and named.
    (place / "r.toml").write_text(
        RECIPE.replace('"touch /etc/later"', '"date +%s%N > /etc/clock; cat /proc/uptime > /etc/up"')
    )
    builder.build(place / "r.toml", "", Steps(), builder.Options())
    with pytest.raises(UserError, match=r"layer 2 \(run .*\n.*C /etc/") as told:
        verifying.verify(place / "r.toml", "", Steps())
    assert told.value.status == 1
    recipe_lock.path_of(place / "r.toml").unlink()
    with pytest.raises(UserError, match="was never built here"):
        verifying.verify(place / "r.toml", "", Steps())


def test_a_family_shares_its_layers(place: Path) -> None:
    (place / "f.toml").write_text(
        '[type.A]\n[type.A.base]\ndirectory = "tree"\n[type.B]\nfrom = "A"\n[[type.B.step]]\nrun = "echo b > /etc/b"\n'
        '[type.C]\nname = "c/c"\nfrom = "B"\n[[type.C.step]]\nrun = "cat /etc/b > /etc/c"\nnetwork = true\n'
    )
    made = builder.build(place / "f.toml", "C", Steps(), builder.Options()).image
    names = {image.hash: image.name for image in Store().images()}
    assert [names[parent] for parent in made.manifest.parents] == ["b", "a"]
    assert len(made.manifest.layers) == 3
    with ExitStack() as stack:
        assert content(tree_of(made, stack), b"etc/c") == b"b\n"
    # A parent that is named is the same image until --update, whatever the name means meanwhile.
    (place / "d.toml").write_text('from = "c/c"\n[[step]]\nrun = "cat /etc/c > /etc/d"\n')
    first = builder.build(place / "d.toml", "", Steps(), builder.Options()).image
    (place / "f.toml").write_text((place / "f.toml").read_text().replace("cat /etc/b", "echo new"))
    renewed = builder.build(place / "f.toml", "C", Steps(), builder.Options()).image
    assert renewed.hash != made.hash
    assert builder.build(place / "d.toml", "", Steps(), builder.Options()).image.hash == first.hash
    # One that is not there any more is not silently another.
    Store().remove(made.hash)
    with pytest.raises(UserError, match=r"its parent 'c/c' is locked as .* which isn't here"):
        builder.build(place / "d.toml", "", Steps(), builder.Options())
    made = renewed
    # By the hash of an image, too, and by its name.
    for parent in (made.hash, "c/c"):
        (place / "d.toml").write_text(f'from = "{parent}"\n[[step]]\nrun = "cat /etc/c > /etc/d"\n')
        child = builder.build(place / "d.toml", "", Steps(), builder.Options(update=True)).image
        assert child.manifest.parents[0] == made.hash


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("touch /etc/later", "echo alas; false"), r"r\.toml:\d+: run .*failed with status 1:\n(.*\n)*.*alas"),
        (("touch /etc/later", "wget -q http://127.0.0.1:1/"), "failed with status 1"),
        (('directory = "tree"', 'directory = "nowhere"'), "nowhere does not exist"),
        (('copy = "site"', 'copy = "nosite"'), r"r\.toml:7: there is no .*nosite to copy"),
        (('[base]\ndirectory = "tree"', 'from = "nobody"'), "'nobody' is neither a type of this file"),
        (("GREETING", "A=B"), "env|key|Invalid"),
    ],
)
def test_a_failing_build_publishes_nothing(place: Path, change: tuple[str, str], why: str) -> None:
    text = RECIPE
    if change[1].startswith("from"):
        text = text.replace("source-date-epoch = 1700000000\n", 'source-date-epoch = 1700000000\nfrom = "nobody"\n')
        change = ('[base]\ndirectory = "tree"\n', "")
    (place / "r.toml").write_text(text.replace(*change))
    with pytest.raises(UserError, match=why):
        builder.build(place / "r.toml", "", Steps(), builder.Options())
    assert Store().images() == []
    assert not recipe_lock.path_of(place / "r.toml").exists()
    left = [path.name for path in sandbox.scratch().iterdir() if path.name != "t"]
    assert left == []
    with pytest.raises(UserError):
        builder.build(place / "r.toml", "", Steps(), builder.Options(locked=True))


def test_steps_keep_acls(place: Path) -> None:
    """Of what they change, and of what they pass through; and a step is let in by them."""
    acl = encode(checked([(USER_OBJ, 6, 0), (USER, 4, 33), (GROUP_OBJ, 4, 0), (MASK, 4, 0), (OTHER, 0, 0)]))
    default = encode(checked([(USER_OBJ, 7, 0), (USER, 7, 12), (GROUP_OBJ, 5, 0), (MASK, 7, 0), (OTHER, 5, 0)]))
    (place / "tree/etc/shared").write_text("for user 33\n")
    try:
        os.setxattr(place / "tree/etc/shared", os.fsdecode(ACCESS), acl)
        os.setxattr(place / "tree/usr/share", os.fsdecode(DEFAULT), default)
    except OSError as error:
        pytest.skip(f"the file system of {place} can't hold ACLs: {error.strerror}")
    (place / "tree/bin/cp").symlink_to("busybox")
    steps = '"cp /etc/shared /etc/mine; echo more >> /etc/shared; echo x > /usr/share/made"'
    recipe = RECIPE.replace('"touch /etc/later"', steps) + '[[step]]\nuser = "33"\n'
    recipe += '[[step]]\nrun = "cat /etc/shared > /tmp/read"\n'
    # TOML has tables of tables at the end.
    boot = '[boot]\ncommand = ["cat", "/etc/greeting"]\n'
    (place / "r.toml").write_text(recipe.replace(boot, "") + boot)
    made = builder.build(place / "r.toml", "", Steps(), builder.Options()).image
    with ExitStack() as stack:
        tree = tree_of(made, stack)

        def acls(path: bytes) -> dict[bytes, bytes]:
            node = tree.root.find(path)
            assert node is not None, path
            return {key: value for key, value in node.entry.xattrs if key in (ACCESS, DEFAULT)}

        assert content(tree, b"etc/shared") == b"for user 33\nmore\n"
        assert acls(b"etc/shared") == {ACCESS: acl}
        assert acls(b"etc/mine") == {}
        assert acls(b"usr/share") == {DEFAULT: default}
        assert decode(acls(b"usr/share/made")[ACCESS])[1] == (USER, 7, 12)
        assert acls(b"usr/share/gone") == {ACCESS: default, DEFAULT: default}
    assert verifying.verify(place / "r.toml", "", Steps()) == made.hash


def test_a_step_is_root_of_nothing_here(place: Path) -> None:
    """It sees neither the host's files nor its processes, and is nobody among its users."""
    if os.geteuid() != 0:
        pytest.skip("an ordinary user's own files are theirs in the sandbox, too")
    secret = place / "secret"
    secret.write_text("mine")
    secret.chmod(0o600)
    (place / "r.toml").write_text(
        RECIPE.replace(
            '"touch /etc/later"',
            f'"cat {secret} && exit 3; cat /proc/self/uid_map > /etc/map; echo /proc/[0-9]* > /etc/procs"',
        )
    )
    made = builder.build(place / "r.toml", "", Steps(), builder.Options()).image
    with ExitStack() as stack:
        tree = tree_of(made, stack)
        assert content(tree, b"etc/map").split() == [b"0", str(sandbox.ROOT_BASE).encode(), b"65536"]
        assert len(content(tree, b"etc/procs").split()) <= 2


def test_users_without_subordinate_ids_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setattr(sandbox, "_subordinate", lambda *_: 0)
    with pytest.raises(UserError, match="has no range of 65536") as told:
        sandbox.ids()
    assert "usermod --add-subuids" in told.value.hint
