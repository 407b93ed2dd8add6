"""From what a boot read to a sorted image with a trace: squashfs layouts, recordings, packing again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from itertools import permutations
from pathlib import Path

import pytest
from click.testing import CliRunner

from hostos.cli.image import image as command
from hostos.errors import UserError
from hostos.image import retrace
from hostos.image.layout import Layout, read_layout
from hostos.image.pack import pack
from hostos.image.publish import publish
from hostos.image.recording import Recorded, Recording, Touch, from_reads, to_trace
from hostos.image.store import Store
from hostos.live.trace import Range, Trace, blocks
from hostos.steps import Steps

pytestmark = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("tar2sqfs", "sqfs2tar", "sqfstar", "zstd", "unsquashfs")),
    reason="needs squashfs-tools-ng, squashfs-tools and zstd",
)


@pytest.fixture
def rich(tree: Path) -> Path:
    """The tree, and files of all kinds that squashfs stores differently."""
    noise = random.Random(3)
    for number in range(40):
        (tree / f"etc/small{number:02}").write_bytes(noise.randbytes(700 + number))
    (tree / "big").write_bytes(noise.randbytes(400_000))
    (tree / "exact").write_bytes(noise.randbytes(131072))
    (tree / "empty.txt").write_bytes(b"")
    (tree / "holes").write_bytes(noise.randbytes(131072) + bytes(262144) + noise.randbytes(5000))
    for number in range(300):
        (tree / "empty" / f"name-{number:04}").write_bytes(b"%d" % number)
    return tree


def test_layout_finds_contents_where_they_are(rich: Path, tmp_path: Path) -> None:
    pack(rich, tmp_path / "x", Steps())
    layout, raw = read_layout(tmp_path / "x"), (tmp_path / "x").read_bytes()
    there = {b""} | {
        os.fsencode(path.relative_to(rich)) for path in map(Path, [*rich.rglob("*")]) if not path.is_socket()
    }
    assert layout.paths.keys() == there
    # Noise doesn't compress: squashfs stores it as it is.
    for name in ("big", "exact", "usr/bin/prog"):
        place = layout.paths[name.encode()]
        content = (rich / name).read_bytes()
        got = b"".join(raw[offset : offset + size] for offset, size in place.blocks)
        assert content.startswith(got)
        assert len(got) >= len(content) // 131072 * 131072
    hole = layout.paths[b"holes"]
    assert [bool(size) for _, size in hole.blocks[:3]] == [True, False, False]
    assert hole.block(1) == ()
    small = layout.paths[b"etc/small07"]
    (fragment,) = [span for span in small.tail if (rich / "etc/small07").read_bytes() in raw[span[0] : sum(span)]]
    assert fragment
    assert layout.paths[b"etc/motd"] == layout.paths[b"etc/motd.again"] or (
        layout.paths[b"etc/motd"].tail == layout.paths[b"etc/motd.again"].tail
    )
    used = layout.always[-1]
    assert sum(used) <= len(raw)


@pytest.mark.parametrize("data", [b"", b"hsqs", b"hsqs" + bytes(92), b"hsqs" + b"\xff" * 92])
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UserError, match="structures"):
        read_layout(tmp_path / "x")


def make(home: Path, tree: Path, **options: object) -> tuple[Store, str]:
    store = Store()
    return store, publish(tree, "test/traced", Steps(), **options).hash  # type: ignore[arg-type]


WANTED = ("etc/small31", "usr/bin/prog", "etc/small02", "holes")


def read_from(layout: Layout, names: tuple[str, ...]) -> list[tuple[int, int, int]]:
    """Reads of whole pages, as the kernel makes them."""
    found = []
    for name in names:
        for offset, size in layout.paths[name.encode()].blocks:
            if size:
                low = offset // 4096 * 4096
                found.append((0, low, -(-(offset + size) // 4096) * 4096 - low))
    return found


def test_reads_of_the_twin_become_paths(home: Path, rich: Path) -> None:
    store, made = make(home, rich)
    with retrace.twin(store, store.get(made), Steps()) as (twin, layout):
        assert store.get(twin).name == retrace.TWIN_NAME
        recorded = from_reads(("sh",), read_from(layout, WANTED), layout, 0)
        assert not any(place.tail for place in layout.paths.values())
    assert store.find(twin) is None
    order = [os.fsdecode(touch.path) for touch in recorded.touches if isinstance(touch, Touch)]
    # Tiny files that share a page can't be told apart; nothing else comes in between.
    assert [name for name in dict.fromkeys(order) if name in WANTED] == list(WANTED)
    assert len(set(order)) < 4 + 16
    assert "big" not in order
    assert Touch(b"usr/bin/prog", (0, 1, 2)) in recorded.touches
    assert Touch(b"holes", (0, 3)) in recorded.touches


def test_small_files_of_one_page_are_told_apart_if_the_reads_are(home: Path, rich: Path) -> None:
    store, made = make(home, rich)
    with retrace.twin(store, store.get(made), Steps()) as (_, layout):
        places = {name: layout.paths[name].blocks[0] for name in (b"etc/small%02d" % number for number in range(40))}

    def units(name: bytes, size: int) -> range:
        start, length = places[name]
        return range(start // size, (start + length - 1) // size + 1)

    # Both lie in one page, and the other begins in the last kilobyte of the first and ends in the next.
    one, other = next(
        (one, other)
        for one, other in permutations(places, 2)
        if list(units(one, 4096)) == list(units(other, 4096)) == [units(one, 4096)[0]]
        and units(one, 1024)[-1] == units(other, 1024)[0] < units(other, 1024)[-1]
    )

    def touched(*names: bytes) -> set[bytes]:
        """By reads of a kilobyte each, as the kernel makes them through a loop device."""
        reads = [(0, unit * 1024, 1024) for name in names for unit in units(name, 1024)]
        return {touch.path for touch in from_reads(("sh",), reads, layout, 0).touches if isinstance(touch, Touch)}

    assert one in touched(one)
    assert other not in touched(one)
    assert {one, other} <= touched(one, other)


def recording(*names: str) -> Recording:
    return Recording((Recorded(("sh",), tuple(Touch(name.encode(), (0,)) for name in names)),))


def test_packed_again_what_is_read_first_lies_first(home: Path, rich: Path) -> None:
    store, plain = make(home, rich)
    wanted = recording(*WANTED)
    traced = retrace.repack(store, store.get(plain), wanted, Steps())
    bundle = store.bundle(traced)
    assert bundle.trace
    (workload,) = bundle.trace.workloads
    assert workload.command == ("sh",)
    layout = read_layout(store.layer_path(bundle.manifest.layers[0]))
    starts = [layout.paths[name.encode()].blocks[0][0] for name in ("usr/bin/prog", "holes")]
    others = [layout.paths[name].blocks[0][0] for name in (b"big", b"exact")]
    assert starts == sorted(starts)
    assert max(starts) < min(others)
    # The trace leads to the contents: where they are is among its blocks.
    fetched = {block for _, block in blocks(workload.ranges)}
    for name in WANTED:
        for offset, size in layout.paths[name.encode()].block(0):
            assert set(range(offset // 16384, (offset + size - 1) // 16384 + 1)) <= fetched
    assert {0} <= fetched
    # Nothing of the tree has changed.
    files = [store.layer_path(store.get(item).manifest.layers[0]) for item in (plain, traced)]
    first, second = (subprocess.run(["sqfs2tar", "-r", ".", file], stdout=subprocess.PIPE).stdout for file in files)
    assert len(first) > 1_000_000
    assert first == second
    assert store.get(plain)


def test_the_same_recording_gives_the_same_image_whichever_way(home: Path, rich: Path, tmp_path: Path) -> None:
    store, plain = make(home, rich)
    wanted = recording(*WANTED)
    first = retrace.repack(store, store.get(plain), wanted, Steps())
    again = retrace.repack(store, store.get(first), wanted, Steps())
    _, at_once = make(home, rich, recording=wanted)
    assert first == again == at_once != plain
    (tmp_path / "boot.json").write_bytes(wanted.to_json())
    words = ["trace", plain, "--recording", str(tmp_path / "boot.json"), "--replace"]
    assert first in CliRunner().invoke(command, words).output.splitlines()
    assert [item.hash for item in store.images()] == [first]


def test_what_the_tree_no_longer_has_is_left_out(home: Path, rich: Path) -> None:
    _, made = make(home, rich, recording=recording("gone/for/ever", "etc/small31", "usr/bin/prog/below"))
    trace = Store().bundle(made).trace
    assert trace
    assert trace.workloads[0].size > 0


def test_a_recording_is_read_back(tmp_path: Path) -> None:
    touches = (Touch(b"\xff\xfe", (0, 3)), Touch('grüße "x"\n'.encode(), ()), (0, 4096, 131072))
    made = Recording((Recorded((), touches), Recorded(("a b", "ü"), ())))
    (tmp_path / "x").write_bytes(made.to_json())
    assert Recording.read(tmp_path / "x") == made
    assert made.order() == {b"\xff\xfe": 0, 'grüße "x"\n'.encode(): 1}


@pytest.mark.parametrize(
    "data",
    [
        "", "[]", "{}", '{"schema":1,"kind":"hostos-recording","workloads":[]}',
        '{"schema":2,"kind":"hostos-recording","workloads":[{"command":[],"touched":[]}]}',
        '{"schema":1,"kind":"hostos-recording","workloads":[{"command":"x","touched":[]}]}',
        *(
            '{"schema":1,"kind":"hostos-recording","workloads":[{"command":[],"touched":[' + item + "]}]}"
            for item in ('"x"', '["x"]', '["x",[-1]]', '["x",["0"]]', "[0,0,0]", "[0,-1,5]", '[0,"0",5]', "[]")
        ),
    ],
)  # fmt: skip
def test_what_is_no_recording_is_refused(tmp_path: Path, data: str) -> None:
    (tmp_path / "x").write_text(data)
    with pytest.raises(UserError, match="recording|schema"):
        Recording.read(tmp_path / "x")


def test_ranges_of_a_trace_are_whole_blocks_without_repetition() -> None:
    layout = Layout(131072, ((0, 96),), {})
    made = Recording((Recorded((), ((0, 10, 20), (0, 16384, 16384), (0, 0, 5), (0, 65536, 1), (0, 1 << 40, 5))),))
    trace = Trace.parse(to_trace(made, layout, [1 << 20, 1 << 20]), [1 << 20, 1 << 20])
    assert trace.workloads[0].ranges == (Range(1, 0, 1), Range(0, 0, 2), Range(0, 4, 1))


@pytest.mark.parametrize(
    "words",
    [
        ["trace", "nothing/here"],
        ["trace", "x", "--recording", "f", "--", "sh"],
        ["publish", "x", "--name", "a", "--trace", "sh", "--recording", "f"],
        ["publish", "x", "--name", "a", "--save", "f"],
        ["publish", "{tree}", "--name", "a", "--trace", "'"],
    ],
)
def test_bad_words_change_nothing(home: Path, tree: Path, words: list[str]) -> None:
    done = CliRunner().invoke(command, [word.format(tree=tree) for word in words])
    assert isinstance(done.exception, UserError)
    assert not list((home / "data/images").iterdir()) if (home / "data/images").exists() else True
    assert json.dumps(words)
