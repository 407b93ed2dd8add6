"""Packing: nothing of a tree is lost, the same tree gives the same bytes, bad input is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import stat
import struct
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import add_what_is_hard, snapshot

from hostos.errors import UserError
from hostos.image import sources, squashfs
from hostos.image.architecture import elf_machine
from hostos.image.entries import Entry, arrange
from hostos.image.layers import read_layer
from hostos.image.order import boot_rank
from hostos.image.pack import pack
from hostos.steps import Steps

pytestmark = pytest.mark.skipif(
    not (shutil.which("tar2sqfs") and shutil.which("unsquashfs")),
    reason="needs tar2sqfs (squashfs-tools-ng) and unsquashfs (squashfs-tools)",
)
as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can make and compare owners, devices and capabilities"
)

# pathlib doesn't take names that are bytes.

Add = Callable[..., None]


def elf(machine: int = 62, kind: int = 3) -> bytes:
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", kind, machine, 1) + bytes(40)


def quiet_pack(source: Path, target: Path, **options: Any) -> bytes:
    pack(source, target, Steps(), **options)
    return target.read_bytes()


def make_tar(path: Path, fill: Callable[[Add], object], *, program: bool = True) -> Path:
    """A PAX archive; `fill` gets a function add(name, data=b"", **TarInfo attributes)."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, data: bytes = b"", **attributes: Any) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))

        if program:
            add("bin/prog", elf(), mode=0o755)
        fill(add)
    return path


def system_tar(tree: Path, path: Path, *options: str) -> Path:
    command = [
        "tar",
        "--xattrs",
        "--xattrs-include=*",
        "--format=pax",
        *options,
        "-cf",
        str(path),
        "-C",
        str(tree),
        ".",
    ]
    subprocess.run(command, check=True, timeout=60)
    return path


def listing(path: Path) -> dict[str, str]:
    """path -> "mode owner size-or-device target" of a squashfs file, without root."""
    text = subprocess.run(["unsquashfs", "-lln", str(path)], capture_output=True, check=True, timeout=60).stdout
    result = {}
    for line in text.decode("utf-8", "surrogateescape").splitlines():
        head, found, name = line.partition(" squashfs-root")
        if found:
            result[name] = " ".join(head.split()[:2])
    return result


# --- the same tree, the same bytes ---


def test_directory_and_archives_give_the_same_layer(tree: Path, tmp_path: Path) -> None:
    expected = quiet_pack(tree, tmp_path / "1.sqfs")
    assert quiet_pack(tree, tmp_path / "2.sqfs") == expected
    plain = system_tar(tree, tmp_path / "t.tar")
    data = plain.read_bytes()
    variants = {"tar": data, "gz": gzip.compress(data), "bz2": bz2.compress(data), "xz": lzma.compress(data)}
    variants["lzma"] = lzma.compress(data, lzma.FORMAT_ALONE)
    if shutil.which("zstd"):
        variants["zst"] = subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout
    for suffix, content in variants.items():
        (tmp_path / f"t.{suffix}").write_bytes(content)
        assert quiet_pack(tmp_path / f"t.{suffix}", tmp_path / "3.sqfs") == expected, suffix
    # Another order in the archive is the same tree, too.
    names = sorted((os.fsencode(p.relative_to(tree)) for p in tree.rglob("*")), reverse=True)
    listed = b"\0".join(b"./" + name for name in [b"", *names])
    subprocess.run(
        ["tar", "-C", tree, "--format=pax", "--no-recursion", "-cf", tmp_path / "r.tar", "--null", "-T", "-"],
        input=listed, check=True, timeout=60,
    )  # fmt: skip
    assert quiet_pack(tmp_path / "r.tar", tmp_path / "4.sqfs") == expected


def test_the_number_of_processors_does_not_matter(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = quiet_pack(tree, tmp_path / "1.sqfs")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1234567")
    assert quiet_pack(tree, tmp_path / "2.sqfs") == expected


def test_a_change_changes_the_layer(tree: Path, tmp_path: Path) -> None:
    before = quiet_pack(tree, tmp_path / "1.sqfs")
    os.utime(tree / "etc/motd", (1, 1))
    assert quiet_pack(tree, tmp_path / "2.sqfs") != before


# --- nothing is lost ---


@pytest.fixture
def hard_tree(tree: Path) -> Path:
    """What only root can make, on top of `tree`."""
    if not shutil.which("setfacl"):
        pytest.skip("needs setfacl (acl)")
    try:
        add_what_is_hard(tree)
    except OSError as error:
        pytest.skip(f"the file system of {tree} can't hold extended attributes: {error.strerror}")
    return tree


@as_root
@pytest.mark.parametrize("way", ["directory", "gnu tar", "gnu tar sparse", "bsdtar"])
def test_everything_survives(hard_tree: Path, tmp_path: Path, way: str) -> None:
    source = hard_tree
    if way == "directory":
        os.link(hard_tree / "disk", hard_tree / "disk2")  # archivers don't keep links between devices
    if way == "bsdtar":
        if not shutil.which("bsdtar"):
            pytest.skip("needs bsdtar (libarchive-tools)")
        source = tmp_path / "t.tar"
        # Attributes of the root and non-UTF-8 names are in its archives like all others.
        subprocess.run(
            ["bsdtar", "--xattrs", "--acls", "--numeric-owner", "--format=pax", "-cf", source, "-C", hard_tree, "."],
            check=True, timeout=60, stderr=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    elif way != "directory":
        source = system_tar(hard_tree, tmp_path / "t.tar", *(["--sparse", "--acls"] if "sparse" in way else []))
    target = tmp_path / "layer.sqfs"
    pack(source, target, Steps())
    subprocess.run(
        ["unsquashfs", "-quiet", "-no-progress", "-d", tmp_path / "out", target],
        check=True, timeout=60, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    # Squashfs has no ACLs: they are a list in the layer, which setfacl(1) reads, too.
    subprocess.run(["setfacl", "--restore=.hostos-acls"], cwd=tmp_path / "out", check=True, timeout=60)
    (tmp_path / "out/.hostos-acls").unlink()
    os.utime(tmp_path / "out", (1, hard_tree.stat().st_mtime))
    expected, found = snapshot(hard_tree), snapshot(tmp_path / "out")
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path] == value, path


@as_root
def test_holes_stay_holes(hard_tree: Path, tmp_path: Path) -> None:
    pack(hard_tree, tmp_path / "layer.sqfs", Steps())
    assert (tmp_path / "layer.sqfs").stat().st_size < 1 << 20


def test_owners_and_devices_need_no_root(tmp_path: Path) -> None:
    def fill(add: Add) -> None:
        add(".", type=tarfile.DIRTYPE, mode=0o710, uid=3, gid=4)
        add("su", b"x", mode=0o4755, uid=0, gid=70_000)
        add("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        add("dev/sda", type=tarfile.BLKTYPE, devmajor=8, devminor=0, mode=0o660, gid=6)
        add("p", type=tarfile.FIFOTYPE, mode=0o600)
        add("l", type=tarfile.SYMTYPE, linkname="../anywhere", uid=9)

    pack(make_tar(tmp_path / "t.tar", fill), tmp_path / "layer.sqfs", Steps())
    assert listing(tmp_path / "layer.sqfs") == {
        "": "drwx--x--- 3/4",
        "/bin": "drwxr-xr-x 0/0",
        "/bin/prog": "-rwxr-xr-x 0/0",
        "/su": "-rwsr-xr-x 0/70000",
        "/dev": "drwxr-xr-x 0/0",
        "/dev/null": "crw-rw-rw- 0/0",
        "/dev/sda": "brw-rw---- 0/6",
        "/p": "prw------- 0/0",
        "/l -> ../anywhere": "lrwxrwxrwx 9/0",
    }


def test_a_later_entry_replaces_an_earlier_one(tmp_path: Path) -> None:
    def fill(add: Add) -> None:
        add("a", b"old", mode=0o600)
        add("./a", b"new", mode=0o640)

    pack(make_tar(tmp_path / "t.tar", fill), tmp_path / "layer.sqfs", Steps())
    cat = subprocess.run(["unsquashfs", "-cat", tmp_path / "layer.sqfs", "a"], capture_output=True, check=True)
    assert cat.stdout == b"new"
    assert listing(tmp_path / "layer.sqfs")["/a"] == "-rw-r----- 0/0"


def test_a_hard_link_keeps_what_it_was_made_to(tmp_path: Path) -> None:
    def fill(add: Add) -> None:
        add("f", b"1", mode=0o600)
        add("h", type=tarfile.LNKTYPE, linkname="f")
        add("g", type=tarfile.LNKTYPE, linkname="./h")
        add("f", b"2", mode=0o600)

    pack(make_tar(tmp_path / "t.tar", fill), tmp_path / "layer.sqfs", Steps())
    for name, content in [("f", b"2"), ("g", b"1"), ("h", b"1")]:
        cat = subprocess.run(["unsquashfs", "-cat", tmp_path / "layer.sqfs", name], capture_output=True, check=True)
        assert cat.stdout == content
    assert squashfs.read_superblock(tmp_path / "layer.sqfs").inodes == 5  # root, bin, prog, f, and g = h


def test_what_cannot_be_kept_is_said(tree: Path, tmp_path: Path, listener: Any) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tree)  # the path may be too long for a socket
        try:
            server.bind("s")
        finally:
            os.chdir(here)
        pack(tree, tmp_path / "layer.sqfs", listener.steps)
    assert any("1 sockets left out" in warning for warning in listener.warnings)
    assert "/s" not in listing(tmp_path / "layer.sqfs")


# --- what is not a tree ---


@pytest.mark.parametrize(
    ("fill", "complaint"),
    [
        (lambda add: add("../evil", b"x"), "leaves the tree"),
        (lambda add: add("a/../../evil", b"x"), "leaves the tree"),
        (lambda add: add("/etc/passwd", b"x"), "absolute path"),
        (lambda add: (add("d", type=tarfile.SYMTYPE, linkname="/tmp"), add("d/evil", b"x")), "not a directory"),
        (lambda add: (add("f", b"x"), add("f/g", b"x")), "not a directory"),
        (lambda add: add("h", type=tarfile.LNKTYPE, linkname="nothing"), "hard link"),
        (lambda add: add("h", type=tarfile.LNKTYPE, linkname="h"), "hard link"),
        (lambda add: add("h", type=tarfile.LNKTYPE, linkname="/etc/shadow"), "absolute path"),
        (lambda add: add("h", type=tarfile.LNKTYPE, linkname="../../etc/shadow"), "leaves the tree"),
        (lambda add: (add("d", type=tarfile.DIRTYPE), add("h", type=tarfile.LNKTYPE, linkname="d")), "directory"),
        (lambda add: add("x" * 256, b"x"), "too long"),
        (lambda add: add("s", type=tarfile.SYMTYPE, linkname=""), "target"),
        (lambda add: add("c", type=tarfile.CHRTYPE, devmajor=5000, devminor=1), "device"),
        (lambda add: add("t", type=b"Z"), "type"),
        (lambda add: add(".", b"x"), "root is not a directory|not a directory"),
        (lambda add: add("u", b"x", uid=1 << 33), "owner"),
    ],
)  # fmt: skip
def test_hostile_archives(tmp_path: Path, fill: Callable[[Add], object], complaint: str) -> None:
    source = make_tar(tmp_path / "t.tar", fill)
    with pytest.raises(UserError, match=complaint) as caught:
        pack(source, tmp_path / "layer.sqfs", Steps())
    assert caught.value.status == 2
    assert not (tmp_path / "layer.sqfs").exists()


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_cut_archives_are_refused_at_any_length(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    def fill(add: Add) -> None:
        for number in range(3):
            add(f"file{number}", os.urandom(2000))

    data = compress(make_tar(tmp_path / "t.tar", fill).read_bytes().rstrip(b"\0") + bytes(1024 + 512))
    step = max(1, len(data) // 25)
    # Whatever is missing but the padding at the end, it must be noticed.
    for length in [*range(0, len(data) - 1100, step), 1, 511, 512, 513]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(UserError):
            pack(tmp_path / "cut", tmp_path / "layer.sqfs", Steps())


def test_damage_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    source = make_tar(tmp_path / "t.tar", lambda add: [add(name, b"1") for name in "abc"])
    data = bytearray(source.read_bytes())
    at = data.index(b"b\0")
    data[at + 148 : at + 156] = b"9999999\0"  # checksum of the header
    source.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        pack(source, tmp_path / "layer.sqfs", Steps())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=2000))
def test_noise_is_refused_politely(tmp_path: Path, data: bytes) -> None:
    for prefix in (b"", b"hsqs", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0"):
        (tmp_path / "noise").write_bytes(prefix + data)
        with pytest.raises(UserError):
            pack(tmp_path / "noise", tmp_path / "layer.sqfs", Steps())


def test_sources_that_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "void").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name, complaint in [
        ("absent", "does not exist"),
        ("empty", "is empty"),
        ("text", "not a usable tar"),
        ("void", "architecture"),
        ("fifo", "neither"),
    ]:
        with pytest.raises(UserError, match=complaint):
            pack(tmp_path / name, tmp_path / "layer.sqfs", Steps())


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_decompression_bombs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(sources, "BOMB_SIZE", 1 << 20)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    plain = make_tar(tmp_path / "t.tar", lambda add: add("zeros", bytes(8 << 20))).read_bytes()
    bomb = tmp_path / "bomb"
    bomb.write_bytes(compress(plain))
    with pytest.raises(UserError, match="times its size: refused") as caught:
        pack(bomb, tmp_path / "layer.sqfs", Steps())
    assert caught.value.status == 2
    assert {path.name for path in tmp_path.iterdir()} == {"bomb", "t.tar"}


def test_holes_of_a_layer_take_no_space_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's layer of a few bytes may have a file of terabytes, all of it a hole."""
    (tmp_path / "tree").mkdir()
    with (tmp_path / "tree/hole").open("wb") as file:
        file.truncate(3 << 30)
    pack(tmp_path / "tree", tmp_path / "layer", Steps(), architecture="x86_64")
    assert (tmp_path / "layer").stat().st_size < 1 << 20
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = shutil.disk_usage(tmp_path).free
    with ExitStack() as stack:
        (entry,) = (each for each in read_layer(tmp_path / "layer", stack) if each.path == b"hole")
        assert entry.size == 3 << 30
        assert shutil.disk_usage(tmp_path).free > before - (1 << 30)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_unreadable_files_are_named(tree: Path, tmp_path: Path) -> None:
    (tree / "etc/motd").chmod(0)
    with pytest.raises(UserError, match=r"can't be read: .*etc/motd"):
        pack(tree, tmp_path / "layer.sqfs", Steps())


def test_a_full_disk_is_a_failure(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="packing failed") as caught:
        pack(tree, Path("/dev/full"), Steps())
    assert caught.value.status == 1


# --- architectures ---


@pytest.mark.parametrize(("machine", "name"), [(62, "x86_64"), (183, "aarch64"), (243, "riscv64"), (40, "armv7l")])
def test_architectures_are_read_from_programs(tmp_path: Path, machine: int, name: str) -> None:
    def fill(add: Add) -> None:
        add("lib/firmware/blob", elf(3, kind=1), mode=0o755)  # not a program
        add("usr/bin/sh", elf(machine), mode=0o755)
        add("usr/games/other", elf(22), mode=0o755)

    source = make_tar(tmp_path / "t.tar", fill, program=False)
    assert pack(source, tmp_path / "1.sqfs", Steps()).architecture == name
    assert pack(tmp_path / "1.sqfs", tmp_path / "2.sqfs", Steps()).architecture == name
    assert pack(source, tmp_path / "3.sqfs", Steps(), architecture="s390x").architecture == "s390x"


def test_an_unknown_architecture(tmp_path: Path, tree: Path) -> None:
    with pytest.raises(UserError, match="not known"):
        pack(tree, tmp_path / "1.sqfs", Steps(), architecture="pdp11")
    source = make_tar(tmp_path / "t.tar", lambda add: add("bin/sh", b"#!script " * 9, mode=0o755), program=False)
    with pytest.raises(UserError, match="--arch"):
        pack(source, tmp_path / "1.sqfs", Steps())


@given(st.binary(max_size=64))
def test_headers_of_anything(data: bytes) -> None:
    elf_machine(data)
    assert elf_machine(b"\x7fELF" + data) is None or len(data) >= 16


def test_big_endian_programs() -> None:
    header = b"\x7fELF\x02\x02\x01" + bytes(9) + struct.pack(">HH", 2, 22)
    assert elf_machine(header) == "s390x"


# --- squashfs files ---


def test_a_squashfs_file_is_taken_as_it_is(tree: Path, tmp_path: Path) -> None:
    data = quiet_pack(tree, tmp_path / "1.sqfs")
    assert quiet_pack(tmp_path / "1.sqfs", tmp_path / "2.sqfs") == data
    block = squashfs.read_superblock(tmp_path / "1.sqfs")
    assert (block.compressor, block.block_size) == ("zstd", 128 * 1024)


@pytest.mark.parametrize(
    ("offset", "data", "complaint"),
    [
        (12, struct.pack("<I", 12345), "block size"),
        (20, struct.pack("<H", 2), "lzma"),
        (20, struct.pack("<H", 77), "number 77"),
        (28, struct.pack("<H", 3), "version 3.0"),
        (40, struct.pack("<Q", 1 << 40), "cut short"),
        (64, struct.pack("<Q", 1 << 40), "damaged"),
        (100, None, "cut short|not a squashfs"),
        (50_000, None, "cut short"),
    ],
)
def test_damaged_squashfs_files(tree: Path, tmp_path: Path, offset: int, data: bytes | None, complaint: str) -> None:
    content = bytearray(quiet_pack(tree, tmp_path / "1.sqfs"))
    if data is None:
        del content[offset:]
    else:
        content[offset : offset + len(data)] = data
    (tmp_path / "bad.sqfs").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        pack(tmp_path / "bad.sqfs", tmp_path / "2.sqfs", Steps())


def test_damage_inside_a_squashfs_file_is_found(tree: Path, tmp_path: Path) -> None:
    content = bytearray(quiet_pack(tree, tmp_path / "1.sqfs"))
    directories = struct.unpack_from("<Q", content, 72)[0]
    content[directories : directories + 64] = b"\xa5" * 64
    (tmp_path / "bad.sqfs").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        pack(tmp_path / "bad.sqfs", tmp_path / "2.sqfs", Steps())


# --- arranging ---

names = st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=3).map(b"/".join)
kinds = st.sampled_from([stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777])


@given(st.lists(st.tuples(names, kinds, st.one_of(st.none(), names)), max_size=8))
def test_arranged_trees_are_trees(items: list[tuple[bytes, int, bytes | None]]) -> None:
    entries = [
        Entry(path, mode, link=link if stat.S_ISREG(mode) else None, target=b"x" if stat.S_ISLNK(mode) else b"")
        for path, mode, link in items
    ]
    try:
        arranged = arrange(entries, "test")
    except UserError:
        return
    by_path = {entry.path: entry for entry in arranged}
    assert len(by_path) == len(arranged)
    assert {path for path, _, _ in items} <= by_path.keys()
    seen: set[bytes] = set()
    for entry in arranged:
        if entry.path:
            parent = entry.path.rpartition(b"/")[0]
            assert parent in seen
            assert stat.S_ISDIR(by_path[parent].mode)
        if entry.link is not None:
            assert entry.link in seen
            assert by_path[entry.link].link is None
        seen.add(entry.path)


def test_what_boots_first_lies_first() -> None:
    order = [
        b"usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
        b"usr/lib/x86_64-linux-gnu/libc.so.6",
        b"usr/bin/dash",
        b"usr/lib/systemd/systemd",
        b"usr/bin/python3.13",
        b"usr/lib/python3.13/encodings/__init__.py",
        b"usr/lib/python3.13/os.py",
        b"usr/lib/python3.13/turtle.py",
        b"usr/share/doc/bash/README",
    ]
    ranks = [boot_rank(path) for path in order]
    assert ranks == sorted(set(ranks))
