"""Overlay rules: what layers mean together is what the kernel's overlayfs shows."""

from __future__ import annotations

import os
import random
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostos.image import overlay
from hostos.image.entries import Entry, arrange
from hostos.image.sources import read_directory
from hostos.steps import Steps

DIR, FILE = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644


def layer(*entries: Entry) -> list[Entry]:
    return arrange(entries, "test")


def shape(tree: overlay.Tree) -> list[tuple[object, ...]]:
    return [(e.path, e.mode, e.uid, e.mtime, e.size, e.target, e.link, e.xattrs) for e in tree.entries()]


def test_whiteouts_and_opaque_directories_hide_what_is_below() -> None:
    below = layer(Entry(b"a/x", FILE), Entry(b"a/y", FILE), Entry(b"b/z", FILE), Entry(b"c", FILE))
    above = layer(
        overlay.whiteout(b"a/x"),
        Entry(b"a", DIR, uid=7),
        overlay.opaque(Entry(b"b", DIR)),
        Entry(b"b/new", FILE),
        Entry(b"c/in", FILE),
    )
    tree = overlay.merge([below, above])
    assert [e.path for e in tree.entries()] == [b"", b"a", b"a/y", b"b", b"b/new", b"c", b"c/in"]
    assert tree.root.find(b"a").entry.uid == 7  # type: ignore[union-attr]
    assert not any(key.startswith(overlay.PREFIX) for e in tree.entries() for key, _ in e.xattrs)


def test_a_renamed_directory_brings_what_was_in_it_below() -> None:
    below = layer(Entry(b"old/deep/x", FILE, mtime=5), Entry(b"other", FILE))
    moved = Entry(b"new", DIR, xattrs=((overlay.PREFIX + b"redirect", b"/old"),))
    tree = overlay.merge([below, layer(moved, Entry(b"new/deep/added", FILE), overlay.whiteout(b"old"))])
    assert [e.path for e in tree.entries()] == [b"", b"new", b"new/deep", b"new/deep/added", b"new/deep/x", b"other"]


def test_an_upper_directory_is_freed_of_what_means_nothing_elsewhere() -> None:
    attributes = (
        (b"user.mine", b"1"),
        (b"user.overlay.impure", b"y"),
        (b"user.overlay.opaque", b"y"),
        (b"user.overlay.origin", b"\0" * 20),
    )
    (found,) = overlay.from_upper([Entry(b"d", DIR, xattrs=attributes)], prefix=overlay.UNPRIVILEGED_PREFIX)
    assert found.xattrs == (overlay.OPAQUE, (b"user.mine", b"1"))


def test_directories_a_layer_only_passes_through_keep_their_attributes() -> None:
    below = overlay.merge([layer(Entry(b"srv", DIR, uid=33, mtime=9), Entry(b"srv/a", FILE))])
    found = overlay.complete([Entry(b"srv/b", FILE)], below, "test")
    assert [(e.path, e.uid, e.mtime) for e in found] == [(b"", 0, 0), (b"srv", 33, 9), (b"srv/b", 0, 0)]


def test_changing_one_name_of_a_file_takes_all_of_them() -> None:
    below = overlay.merge([layer(Entry(b"a", FILE), Entry(b"b", FILE, link=b"a"), Entry(b"c", FILE))])
    above = overlay.merge([layer(Entry(b"a", FILE, mtime=1), Entry(b"b", FILE, link=b"a"), Entry(b"c", FILE))])
    found = overlay.difference(below, above)
    assert [(e.path, e.link) for e in found if e.path] == [(b"a", None), (b"b", b"a")]
    # A name less is a change of the file, too: its count of links is another.
    less = overlay.merge([layer(Entry(b"a", FILE), Entry(b"c", FILE))])
    assert [(e.path, overlay.is_whiteout(e)) for e in overlay.difference(below, less) if e.path] == [
        (b"a", False),
        (b"b", True),
    ]


NAMES = st.sampled_from([b"a", b"b", b"a/a", b"a/b", b"b/a", b"b/a/c", b"c", b"a/b/c"])
ENTRIES = st.builds(
    lambda path, kind, uid, mtime: Entry(path, kind, uid=uid, mtime=mtime, target=b"t" if stat.S_ISLNK(kind) else b""),
    NAMES,
    st.sampled_from([DIR, DIR, FILE, stat.S_IFLNK | 0o777]),
    st.integers(0, 1),
    st.integers(0, 1),
)


def trees() -> st.SearchStrategy[overlay.Tree]:
    def build(entries: list[Entry]) -> overlay.Tree:
        found: dict[bytes, Entry] = {}
        for entry in sorted(entries, key=lambda e: e.path):
            parents = [entry.path[:n] for n, letter in enumerate(entry.path) if letter == ord("/")]
            if all(stat.S_ISDIR(found[p].mode) for p in parents if p in found):
                found[entry.path] = entry
        return overlay.merge([arrange(found.values(), "test")])

    return st.lists(ENTRIES, max_size=8).map(build)


@given(trees(), trees())
@settings(max_examples=300)
def test_a_difference_on_top_gives_the_other_tree(one: overlay.Tree, other: overlay.Tree) -> None:
    found = overlay.difference(one, other)
    assert shape(overlay.merge([one.entries(), found])) == shape(other)
    assert overlay.difference(other, other) == []


@pytest.fixture
def mounted() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def scramble(root: Path, noise: random.Random) -> None:
    """Change a tree as programs do: files, links, renames, removals, attributes."""
    subprocess.run(["rm", "-rf", root / "d2", root / "d3/f1"], check=True)
    (root / "d3/f2").write_bytes(noise.randbytes(5000))
    (root / "d1").rename(root / "moved")  # overlayfs: a redirect
    (root / "moved/more").write_text("more\n")
    (root / "d2").mkdir()  # overlayfs: opaque
    (root / "d2/only").write_text("only\n")
    (root / "d4/f0").unlink()
    (root / "d4/f0").mkdir()
    os.link(root / "d3/f3", root / "linked")
    os.chown(root / "d4/f1", 12, 34)
    os.setxattr(root / "d4/f2", "user.k", b"v")
    (root / "new").symlink_to("nowhere")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems: needs root")
def test_layers_mean_what_the_kernel_shows(tmp_path: Path, mounted: ExitStack) -> None:
    """A real overlay is changed; its upper directory, read as a layer, gives the tree it shows."""
    base = tmp_path / "fs"
    base.mkdir()
    # tmp_path may itself be on an overlay, which can't be an upper one.
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", base], check=True)
    mounted.callback(subprocess.run, ["umount", base], check=True)
    lower, upper, work, root = (base / name for name in ("lower", "upper", "work", "root"))
    for directory in (lower, upper, work, root):
        directory.mkdir()
    noise = random.Random(1)
    for number in range(5):
        (lower / f"d{number}/sub").mkdir(parents=True)
        for file in range(4):
            (lower / f"d{number}/f{file}").write_bytes(noise.randbytes(100))
    options = f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=on"
    subprocess.run(["mount", "-t", "overlay", "overlay", root, "-o", options], check=True)
    mounted.callback(subprocess.run, ["umount", root], check=True)
    scramble(root, noise)
    below = arrange(read_directory(lower, Steps()), "lower")
    changes = arrange(overlay.from_upper(read_directory(upper, Steps())), "upper")
    assert any(overlay.OPAQUE in entry.xattrs for entry in changes)
    assert any(key == overlay.PREFIX + b"redirect" for entry in changes for key, _ in entry.xattrs)
    seen = overlay.merge([arrange(read_directory(root, Steps()), "root")])
    through = overlay.merge([below, changes])
    assert shape(through) == shape(seen)
    assert [e.path for e in overlay.difference(through, seen) if e.path] == []


def test_whiteouts_are_names_of_one_device() -> None:
    """As the kernel makes them: in an archive of an upper directory the others are hard links to the first."""
    first = Entry(b"a", stat.S_IFCHR)
    found = overlay.from_upper([first, Entry(b"b", stat.S_IFREG, link=b"a"), Entry(b"c", stat.S_IFREG | 0o644)])
    assert found[:2] == [overlay.whiteout(b"a"), overlay.whiteout(b"b")]
    assert stat.S_ISREG(found[2].mode)
