import contextlib
import gzip
import io
import stat
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.build import initrd, os_build
from hostos.build.elf import needs, unneeded_libraries
from hostos.build.profile import load_profile
from hostos.build.tree import Tree, from_tar, normal
from hostos.cpio import Entry
from hostos.errors import UserError

names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(st.lists(st.one_of(names, st.just("."), st.just("..")), min_size=1))
def test_no_path_leaves_the_root(parts):
    try:
        path = normal("/".join(parts))
    except UserError:
        return
    assert path == "." or not path.startswith(("/", "../"))
    assert path != ".."


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/bin/sh", "usr/bin/sh"), ("lib64/ld.so", "usr/lib64/ld.so"), ("./etc//x", "etc/x"), ("bin", "bin"), ("/", ".")],
)
def test_the_usr_merge(path, expected):
    assert normal(path) == expected


def tar(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    out.seek(0)
    return out


def member(name, kind=tarfile.REGTYPE, mode=0o644, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname = kind, mode, link
    return info


def test_a_tar_becomes_entries():
    stream = tar(
        (member("./bin/tool", mode=0o4755), b"x"),
        (member("./usr/bin/again", tarfile.LNKTYPE, link="./bin/tool"), b""),
        (member("./etc/link", tarfile.SYMTYPE, link="/bin/tool"), b""),
    )
    tree = Tree()
    for entry in from_tar(stream, "test", lambda path: True):
        tree.add(entry)
    assert tree.entries["usr/bin/tool"].mode == stat.S_IFREG | 0o4755
    assert tree.data("usr/bin/again") == b"x"
    assert tree.data("etc/link") == b"x"


@given(st.binary(max_size=2000))
def test_garbage_is_no_tar(data):
    with contextlib.suppress(UserError):
        list(from_tar(io.BytesIO(data), "garbage", lambda path: True))


def test_a_tar_that_climbs_out_is_refused():
    with pytest.raises(UserError, match="leaves the root"):
        list(from_tar(tar((member("../../etc/passwd"), b"")), "evil", lambda path: True))


def test_links_in_circles_end():
    tree = Tree()
    tree.link("a", "b")
    tree.link("b", "a")
    with pytest.raises(KeyError):
        tree.data("a")


def test_removing_takes_what_is_below():
    tree = Tree()
    tree.file("usr/share/doc/x/y", b"")
    tree.file("usr/share/document", b"")
    tree.directory("usr/share/doc")
    tree.remove()
    assert len(tree.entries) == 3
    tree.remove("usr/share/doc")
    assert list(tree.entries) == ["usr/share/document"]


def test_parents_come_first():
    tree = Tree()
    tree.file("a/b/c", b"1")
    tree.file("a.x", b"2")
    assert [entry.path for entry in tree.sorted()] == ["a", "a.x", "a/b", "a/b/c"]


def test_libraries_nobody_needs_go():
    tree = Tree()
    python = Path(sys.executable).resolve().read_bytes()
    assert needs(python) is not None
    tree.file("usr/bin/program", python, 0o755)
    libc = "libc.so.6"
    tree.file(f"usr/lib/x86_64-linux-gnu/{libc}", b"")
    tree.file("usr/lib/x86_64-linux-gnu/libnobody.so.1.2", b"")
    tree.link("usr/lib/x86_64-linux-gnu/libnobody.so.1", "libnobody.so.1.2")
    tree.file("usr/lib/x86_64-linux-gnu/libkept.so.1.2", b"")
    tree.link("usr/lib/x86_64-linux-gnu/libkept.so.1", "libkept.so.1.2")
    gone = unneeded_libraries(tree, ["libkept.so.1"])
    assert gone == {"usr/lib/x86_64-linux-gnu/libnobody.so.1.2", "usr/lib/x86_64-linux-gnu/libnobody.so.1"}


@given(st.binary(max_size=300))
def test_damaged_elf_is_survived(data):
    needs(b"\x7fELF" + data)


@pytest.fixture(scope="module")
def minimal():
    tree = Tree()
    tree.file("usr/bin/dash", b"dash", 0o755)
    tree.file("usr/lib/systemd/system/sysinit.target.wants/noise.service", b"")
    return initrd.complete(tree, [], load_profile("minimal", "x86_64"))


def test_the_overlay_decides_what_starts(minimal):
    assert "usr/lib/systemd/system/sysinit.target.wants/noise.service" not in minimal
    assert "etc/systemd/system/sysinit.target.wants/ssh.service" in minimal
    assert not any("hostos-live" in path for path in minimal.entries)


def test_accounts_cannot_be_entered_without_a_key(minimal):
    shadow = minimal.data("etc/shadow").decode()
    assert all(line.split(":")[1] in ("*", "!*") for line in shadow.splitlines())
    assert shadow.startswith("root:*:")
    assert minimal.entries["etc/shadow"].mode & 0o777 == 0o600
    assert minimal.entries["root"].mode & 0o777 == 0o700
    assert minimal.data("etc/machine-id") == b""


def test_every_enabled_unit_of_ours_exists(minimal):
    for path in minimal.entries:
        if ".wants/hostos-" in path or path.endswith(".wants/ssh.service"):
            assert minimal.resolve(path) in minimal


def test_same_tree_same_bytes_and_the_sentinel_is_last(minimal, tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    unpacked = initrd.pack(minimal, first)
    shuffled = Tree(dict(reversed(list(minimal.entries.items()))))
    initrd.pack(shuffled, second)
    assert first.read_bytes() == second.read_bytes()
    assert unpacked % 4096 == 0
    data = first.read_bytes()
    assert data.rindex(initrd.SENTINEL.encode()) > data.rindex(b"usr/lib/systemd/system/ssh.service")
    initrd.compress(first, tmp_path / "gz")
    assert (tmp_path / "gz").stat().st_size % 4 == 0
    assert gzip.decompress((tmp_path / "gz").read_bytes()) == data


@given(st.integers(min_value=1 << 20, max_value=1 << 32))
def test_the_memory_floor_holds_the_files(unpacked):
    floor = os_build.min_memory_mib(unpacked) << 20
    assert floor * os_build.ROOT_SHARE >= unpacked
    assert floor % (16 << 20) == 0


def test_entries_keep_their_kind():
    tree = Tree()
    tree.add(Entry("/lib/x", stat.S_IFREG | 0o644, data=b"1"))
    assert list(tree.entries) == ["usr/lib/x"]


def test_what_the_overlay_enables_and_masks_are_links():
    """A copy of the repository that lost its symbolic links would boot a system in which nothing starts."""
    system = initrd.OVERLAY / "etc/systemd/system"
    enabled = [path for place in system.glob("*.wants") for path in place.iterdir()]
    assert enabled
    for path in [*enabled, system / "default.target", initrd.OVERLAY / "etc/resolv.conf"]:
        assert path.is_symlink(), path
