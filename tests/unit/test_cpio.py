"""The cpio writer, judged by GNU cpio and libarchive."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostos.cpio import Entry, directory, file, write_newc

EXTRACTORS = [
    pytest.param(
        ["cpio", "-idmu", "--no-absolute-filenames", "--quiet"],
        marks=pytest.mark.skipif(not shutil.which("cpio"), reason="GNU cpio is not installed"),
    ),
    pytest.param(
        ["bsdcpio", "-idmu", "--quiet"],
        marks=pytest.mark.skipif(not shutil.which("bsdcpio"), reason="bsdcpio (libarchive-tools) is not installed"),
    ),
]


def archive(*entries: Entry) -> bytes:
    out = io.BytesIO()
    assert write_newc(entries, out) == len(out.getvalue())
    return out.getvalue()


def extract(command: list[str], data: bytes, into: Path) -> None:
    subprocess.run(command, input=data, cwd=into, check=True, capture_output=True)


names = st.binary(min_size=1, max_size=40).filter(
    lambda name: not set(name) & {0, ord("/")} and name not in (b".", b"..")
)
files = st.dictionaries(names, st.tuples(st.binary(max_size=300), st.integers(0, 0o777)), max_size=12)


@pytest.mark.parametrize("command", EXTRACTORS)
@settings(max_examples=25, deadline=None)
@given(tree=files)
def test_files_survive(
    command: list[str], tmp_path_factory: pytest.TempPathFactory, tree: dict[bytes, tuple[bytes, int]]
) -> None:
    into = tmp_path_factory.mktemp("tree")
    entries = [
        Entry(b"d/" + name, stat.S_IFREG | mode, mtime=1_000_000_000, data=data) for name, (data, mode) in tree.items()
    ]
    extract(command, archive(directory("d"), *entries), into)
    found = {os.fsencode(path.name): path for path in (into / "d").iterdir()}
    assert found.keys() == tree.keys()
    for name, (data, mode) in tree.items():
        status = found[name].stat()
        assert stat.S_IMODE(status.st_mode) == mode
        assert status.st_mtime == 1_000_000_000
        found[name].chmod(0o600)
        assert found[name].read_bytes() == data


@pytest.mark.parametrize("command", EXTRACTORS)
def test_hard_links_share_one_inode_and_its_content(command: list[str], tmp_path: Path) -> None:
    mode = stat.S_IFREG | 0o644
    # The content given with the first, written with the last.
    data = archive(
        Entry("a", mode, data=b"shared", ino=7),
        file("alone", b"x"),
        Entry("b", mode, ino=7),
        Entry("c", mode, ino=7),
        Entry("s", stat.S_IFLNK | 0o777, data=b"a"),
    )
    extract(command, data, tmp_path)
    assert {(tmp_path / name).stat().st_ino for name in "abc"} == {(tmp_path / "a").stat().st_ino}
    assert (tmp_path / "b").read_bytes() == b"shared"
    assert (tmp_path / "a").stat().st_nlink == 3
    assert (tmp_path / "s").readlink() == Path("a")
    assert (tmp_path / "alone").stat().st_nlink == 1
    assert data.count(b"shared") == 1
    assert data.index(b"shared") > data.index(b"c\0")


@pytest.mark.skipif(not shutil.which("cpio"), reason="GNU cpio is not installed")
def test_owners_and_devices_are_listed() -> None:
    data = archive(
        Entry("null", stat.S_IFCHR | 0o666, rdev=(1, 3)),
        Entry("f", stat.S_IFREG | 0o4755, uid=1234, gid=70000),
    )
    listing = subprocess.run(["cpio", "-itvn", "--quiet"], input=data, check=True, capture_output=True).stdout.decode()
    device, plain = listing.splitlines()
    assert device.startswith("crw-rw-rw-")
    assert "1,   3" in device
    assert plain.startswith("-rwsr-xr-x")
    assert plain.split()[2:4] == ["1234", "70000"]


def test_same_entries_same_bytes_and_aligned() -> None:
    one = archive(directory("/etc/"), file("etc/hostname", b"abc"))
    assert one == archive(directory("etc"), file("/etc/hostname", b"abc"))
    assert len(one) % 4 == 0


@pytest.mark.skipif(not shutil.which("cpio"), reason="GNU cpio is not installed")
def test_archives_follow_each_other(tmp_path: Path) -> None:
    # Each archive ends aligned, so the kernel finds the next; GNU cpio reads one per run.
    first, second = archive(file("one", b"1")), archive(file("two", b"22"))
    both = tmp_path / "both"
    both.write_bytes(first + second)
    with both.open("rb") as stream:
        stream.seek(len(first))
        listed = subprocess.run(["cpio", "-it", "--quiet"], stdin=stream, check=True, capture_output=True).stdout
    assert listed == b"two\n"


@pytest.mark.parametrize(
    "entries",
    [
        [file("a\0b", b"")],
        [file("../etc/passwd", b"")],
        [file("x" * 4096, b"")],
        [file("TRAILER!!!", b"")],
        [file("a", b""), file("/a", b"")],
        [Entry("a", stat.S_IFREG, mtime=-1)],
        [Entry("a", stat.S_IFREG, uid=1 << 32)],
        [Entry("a", stat.S_IFREG, data=b"1", ino=1), Entry("b", stat.S_IFREG, data=b"2", ino=1)],
    ],
)
def test_what_the_format_cannot_say_is_refused(entries: list[Entry]) -> None:
    with pytest.raises(ValueError):
        write_newc(entries, io.BytesIO())
