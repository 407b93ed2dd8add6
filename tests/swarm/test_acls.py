"""ACLs, which squashfs can't hold, are there in a mounted image: in a container, through children, after a capture."""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from trees import set_acls, snapshot

from hostos.errors import UserError
from hostos.image import acls, child, overlay, seeding
from hostos.image.entries import Entry, arrange
from hostos.image.layers import read_image
from hostos.image.pack import write_tar
from hostos.image.publish import publish
from hostos.image.sources import read_plain_tar
from hostos.image.store import Store
from hostos.live.acl import FILE
from hostos.steps import Steps
from swarm.conftest import ROOT, Daemon, Published, copy_tool, run

pytestmark = pytest.mark.skipif(not shutil.which("setfacl"), reason="needs setfacl and getfacl (acl)")

LIST = ("getfacl", "-R", "-n", "-p", "-s", "/srv")


def setfacl(*arguments: str | Path) -> None:
    subprocess.run(["setfacl", *arguments], check=True)


@pytest.fixture(scope="module")
def source(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual tree, and one of everything that can have an ACL."""
    tree = tmp_path_factory.mktemp("acls") / "tree"
    shutil.copytree(published.tree, tree, symlinks=True, copy_function=shutil.copy2, ignore=lambda _, names: [
        name for name in names if name in ("null",) or name.startswith("data")
    ])  # fmt: skip
    copy_tool("getfacl", tree)
    copy_tool("setfacl", tree)
    (tree / "suid").write_bytes(b"x" * 200_001)
    os.chown(tree / "suid", 1000, 70_000)
    (tree / "suid").chmod(0o6755)
    os.setxattr(tree / "suid", "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))
    os.mknod(tree / "null", 0o20666, os.makedev(1, 3))
    os.mkfifo(tree / "pipe")
    (tree / "srv/deep/er").mkdir(parents=True)
    (tree / "srv/large").write_bytes(os.urandom(3_000_000))
    (tree / "srv/deep/er/file").write_text("five")
    (tree / "srv/deep/er/plain").write_text("none")
    (tree / "srv/bare").write_text("bare")
    os.link(tree / "srv/deep/er/file", tree / "srv/again")
    os.chown(tree / "srv/deep/er/file", 1000, 33)
    setfacl("-m", "u:1000:rw,u:33:r,g:7:rx,m::rwx", tree / "srv/large", tree / "srv/deep/er/file",
            tree / "srv/bare")  # fmt: skip
    setfacl("-d", "-m", "u:1000:rwx", tree / "srv/deep")
    set_acls(tree)
    return tree


@pytest.fixture(scope="module")
def shop(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    home = tmp_path_factory.mktemp("shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSTOS_HOME", str(home))
        patch.setenv("XDG_RUNTIME_DIR", str(home))
        made = publish(source, "swarm/acls", Steps()).hash
        yield made, seeding.ensure_started().address
        seeding.stop()


def getfacl(tree: Path) -> list[str]:
    """As `LIST` prints it in a container, sorted by path."""
    done = subprocess.run([*LIST[:-1], "srv"], cwd=tree, capture_output=True, text=True, check=True)
    return blocks(done.stdout.replace("# file: srv", "# file: /srv"))


def blocks(text: str) -> list[str]:
    return sorted(text.strip().split("\n\n"))


def test_everything_is_as_it_was(daemon: Daemon, shop: tuple[str, str], source: Path) -> None:
    with daemon.client() as client:
        answer = client.ask("mount", image=shop[0], peers=[shop[1]], name="look")
        root = Path(answer["root"])
        expected = snapshot(source)
        assert any(key.startswith("system.posix_acl") for key, _ in expected[b""][-1])
        # First without reading any content: none is fetched for its ACL.
        assert subprocess.run(["getfacl", "-R", root], capture_output=True, check=True).stdout
        fetched = client.ask("stats", name="look")["fetched"]
        assert fetched < 1_500_000
        found = snapshot(root)
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            assert found[path] == value, path
        client.ask("unmount", name="look")


def test_a_container_has_them_for_its_own_users(daemon: Daemon, shop: tuple[str, str], source: Path) -> None:
    with daemon.client() as client:
        ran = run(client, shop[0], shop[1], *LIST)
        assert ran.status == 0, ran.stderr
        assert blocks(ran.stdout.decode()) == getfacl(source)
        # They count: user 33 may read what only the ACL lets it, and what is made in a directory inherits.
        script = "echo new > /srv/deep/made; getfacl -n -p /srv/deep/made; stat -c '%h %i' /srv/again /srv/deep/er/file"
        ran = run(client, shop[0], shop[1], "sh", "-c", script)
        assert ran.status == 0, ran.stderr
        lines = ran.stdout.decode().splitlines()
        assert any(line.startswith("user:1000:rwx") for line in lines)
        assert lines[-1] == lines[-2]
        assert lines[-1].startswith("2 ")
        # What has none costs nothing.
        assert (daemon.base / "mounts").is_dir()
        assert not any("acls" in point for point in daemon.mounts())


def test_an_image_without_any_has_no_layer_for_them(daemon: Daemon, published: Published, seed: object) -> None:
    peer = "127.0.0.2:6881"
    seed(peer)  # type: ignore[operator]
    with daemon.client() as client:
        client.ask("mount", image=published.image, peers=[peer], name="plain")
        assert not any("acls" in point for point in daemon.mounts())
        client.ask("unmount", name="plain")


CHANGES = """
set -e
chmod 0640 /srv/large
chmod 644 /srv/deep/er/plain  # the kernel gives ACLs only to what is not squashfs's any more
setfacl -m u:12:rx /srv/deep/er/plain
echo more >> /srv/deep/er/file
setfacl -b /srv/bare
echo ready; while :; do sleep 0.1; done
"""


def test_children_and_captures_keep_them(daemon: Daemon, shop: tuple[str, str], source: Path, tmp_path: Path) -> None:
    image, seed = shop
    store = Store()
    with daemon.client() as client, ExitStack() as stack:
        answer = client.ask("prepare", image=image, peers=[seed], command=["sh", "-c", CHANGES], hold=True, name="work")
        with subprocess.Popen(
            answer["argv"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as container:
            assert container.stdout
            assert container.stdout.readline() == b"ready\n"
            argv = client.ask("capture", name="work")["argv"]
            sent = subprocess.run(argv, capture_output=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
            client.ask("stop", name="work", deadline=1.0)
        found, _ = read_plain_tar(io.BytesIO(sent.stdout), Path("work"), stack)
        entries = arrange(overlay.from_upper(found), "work")
        named = {entry.path for entry in entries if not stat.S_ISDIR(entry.mode)}
        # Only what it changed, not whatever has an ACL. A hard link breaks on being written to, as in any overlay.
        assert named >= {b"srv/large", b"srv/deep/er/plain", b"srv/deep/er/file", b"srv/bare"}
        assert b"null" not in named
        assert b"shared/one" not in named
        made = child.add_layer(
            store, store.get(image), entries, "swarm/acls-captured", Steps(),
            boot=store.get(image).manifest.boot, made_by="capture",
        )  # fmt: skip
        tree = read_image(store, store.get(made.hash), stack, Steps())
        large = tree.root.find(b"srv/large")
        assert large
        assert large.entry.open
        with large.entry.open() as file:  # of which only the metadata was in the upper directory
            assert file.read() == (source / "srv/large").read_bytes()
        # The same done here gives the same lists, through the child and once it is squashed.
        work = tmp_path / "work"
        subprocess.run(["cp", "-a", source, work], check=True)
        (work / "srv/large").chmod(0o640)
        setfacl("-m", "u:12:rx", work / "srv/deep/er/plain")
        setfacl("-b", work / "srv/bare")
        squashed = child.squash(store, store.get(made.hash), Steps(), name="swarm/acls-flat")
        seeding.reload()
        for each in (made.hash, squashed.hash):
            ran = run(client, each, seed, *LIST)
            assert ran.status == 0, ran.stderr
            assert blocks(ran.stdout.decode()) == getfacl(work)
            ran = run(client, each, seed, "sh", "-c", "cat /srv/deep/er/file; getfacl -n -s -p /srv/bare")
            assert ran.stdout == b"fivemore\n"
        assert child.diff(store, store.get(squashed.hash), store.get(made.hash), Steps()) == []


KEPT = "/tmp/hostos-swarm-kept-acls"


@pytest.mark.parametrize("daemon", [("--keep", KEPT)], indirect=True)
def test_what_is_kept_keeps_them(daemon: Daemon, shop: tuple[str, str]) -> None:
    image, seed = shop
    change = "setfacl -b /srv/large; chmod 644 /srv/deep/er/plain; setfacl -m u:5:x /srv/deep/er/plain; rm /srv/again"
    try:
        with daemon.client() as client:
            assert run(client, image, seed, "sh", "-c", change, persist="mine").status == 0
        daemon.stop()
        daemon.start()
        with daemon.client() as client:
            ran = run(client, image, seed, "sh", "-c", "getfacl -R -n -p -s /srv; ls /srv", persist="mine")
    finally:
        shutil.rmtree(KEPT, ignore_errors=True)
    assert ran.status == 0, ran.stderr
    text = ran.stdout.decode()
    assert "# file: /srv/large" not in text
    assert "user:5:--x" in text
    assert "# file: /srv/deep/er/file" in text
    assert "again" not in text


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"# file: ../etc\nuser::rwx\n", "is no path in the layer"),
        (b"# file: /etc\nuser::rwx\n", "is no path in the layer"),
        (b"# file: bin/ls\nuser::rwx\nuser:1:rwx\ngroup::r-x\nmask::rwx\nother::---\n", "is no directory"),
        (b"# file: bin\nuser::rwx\nuser:1:rwx\ngroup::r-x\nmask::rwx\nother::---\n", "can't have any"),
        (b"# file: nowhere\nuser::rwx\ngroup::r-x\nother::---\n", "is not in the layer"),
        (b"# file: etc\nuser:root:rwx\n", "is no entry of an ACL"),
        (b"# file: etc\nuser::rwx\nuser:1:r--\ngroup::r-x\nother::---\n", "without its mask"),
        (b"user::rwx\n", "no '# file:'"),
        (b"\xff\x00", "no '# file:'"),
        (b"# file: etc/passwd\ndefault:user::rwx\ndefault:group::r--\ndefault:other::r--\n", "is no directory"),
    ],
)  # fmt: skip
def test_lists_that_lie_are_refused(
    daemon: Daemon, shop: tuple[str, str], published: Published, tmp_path: Path, content: bytes, why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As a squashfs file is taken as it is, a stranger's layer may have any list."""
    tree = tmp_path / "tree"
    for name in ("etc", "usr/bin"):
        (tree / name).mkdir(parents=True)
    shutil.copy(published.tree / "usr/bin/ls", tree / "usr/bin/ls")
    (tree / "etc/passwd").write_text("")
    (tree / "bin").symlink_to("usr/bin")
    (tree / os.fsdecode(FILE)).write_bytes(content)
    layer = tmp_path / "layer.squashfs"
    subprocess.run(["mksquashfs", tree, layer, "-quiet", "-no-progress"], check=True, stdout=subprocess.DEVNULL)
    made = publish(layer, "swarm/lying", Steps()).hash
    seeding.reload()
    with daemon.client() as client:
        with pytest.raises(UserError, match="list of ACLs") as caught:
            client.ask("prepare", image=made, peers=[shop[1]], command=["/bin/ls"], name="victim")
        assert why in caught.value.message
        assert not client.ask("list")["containers"]
    Store().remove(made)


def test_a_list_in_a_tree_is_its_acls(tmp_path: Path) -> None:
    """What getfacl printed goes into the image where an archive can't hold ACLs; and names from an archive's passwd."""
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/file").write_text("x")
    (tree / "plain").write_text("y")
    setfacl("-m", "u:7:rw", tree / "etc/file")
    listed = subprocess.run(["getfacl", "-R", "-n", "."], cwd=tree, capture_output=True, check=True).stdout
    setfacl("-b", tree / "etc/file")
    (tree / os.fsdecode(FILE)).write_bytes(listed)
    from hostos.image.sources import read_directory

    entries = acls.absorbed(arrange(read_directory(tree, Steps()), "tree"), "tree")
    assert FILE not in {entry.path for entry in entries}
    assert [entry.path for entry in entries if dict(entry.xattrs).keys() & {b"system.posix_acl_access"}] == [
        b"etc/file"
    ]
    spool = io.BytesIO()
    with Steps().step("") as step:
        write_tar(acls.listed(entries), spool, 0, step, {})
    assert b"# file: etc/file" in spool.getvalue()
    assert b"# file: plain" not in spool.getvalue()
    assert acls.absorbed([Entry(b"", 0o40755)], "x") == [Entry(b"", 0o40755)]
