"""Trees larger than they usually are: a file beyond 4 GiB, and a directory of very many files, exact to the last."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from trees import snapshot

from hostos.image import overlay
from hostos.image.entries import arrange
from hostos.image.layers import read_layer
from hostos.image.pack import pack, write_tar
from hostos.image.sources import read_directory, read_tar
from hostos.steps import Steps

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not shutil.which("tar2sqfs"), reason="needs tar2sqfs (squashfs-tools-ng)"),
]

FILES = int(os.environ.get("HOSTOS_TEST_FILES", "60000"))
"""tar2sqfs takes time with their square: 200,000 are more than six minutes of a processor."""
BEYOND = 5 << 30


@pytest.mark.timeout(3600)
def test_a_directory_of_very_many_files(tmp_path: Path) -> None:
    """From the disk and from an archive of it tar2sqfs is given the same, and the layer is the same tree once unpacked.

    It is packed once: tar2sqfs looks at all names of a directory for each one that it adds.
    """
    tree = tmp_path / "tree"
    (tree / "many").mkdir(parents=True)
    (tree / "none").mkdir()
    for number in range(FILES):
        file = tree / f"many/{number:06}"
        # Some of each: empty, equal to others, of several names.
        if number % 1000 == 999:
            file.hardlink_to(tree / f"many/{number - 1:06}")
            continue
        file.write_text("" if number % 3 == 0 else f"{number // 2}")
        if os.geteuid() == 0:
            os.chown(file, number % 70_000, number % 7)
        os.utime(file, (number, number))
    for path in (tree / "many", tree / "none", tree):
        os.utime(path, (7, 7))
    subprocess.run(["tar", "--format=pax", "-cf", tmp_path / "t.tar", "-C", tree, "."], check=True)
    with ExitStack() as stack:
        given = []
        for entries in (read_directory(tree, Steps()), read_tar(tmp_path / "t.tar", stack, Steps())):
            stream = io.BytesIO()
            with Steps().step("") as step:
                write_tar(arrange(entries, "many"), stream, 0, step, {})
            given.append(hashlib.sha256(stream.getbuffer()).hexdigest())
    assert given[0] == given[1]
    pack(tmp_path / "t.tar", tmp_path / "layer", Steps(), architecture="x86_64")
    command = ["unsquashfs", "-quiet", "-no-progress", "-d", tmp_path / "out", tmp_path / "layer"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found, expected = snapshot(tmp_path / "out"), snapshot(tree)
    assert len(found) == FILES + 3
    assert found == expected
    with ExitStack() as stack:
        merged = overlay.merge([read_layer(tmp_path / "layer", stack)])
        assert len(merged) == FILES + 3
        assert overlay.difference(merged, merged) == []


def test_a_file_beyond_4_gib(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with (tree / "large").open("wb") as file:
        file.write(b"begin")
        file.seek(BEYOND)
        file.write(b"end")
    os.utime(tree / "large", (1, 1))
    pack(tree, tmp_path / "layer", Steps(), architecture="x86_64")
    assert (tmp_path / "layer").stat().st_size < 1 << 20
    listed = subprocess.run(
        ["unsquashfs", "-lln", tmp_path / "layer"], capture_output=True, text=True, check=True
    ).stdout
    assert str(BEYOND + 3) in listed
    command = ["unsquashfs", "-cat", str(tmp_path / "layer"), "large"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as read:
        tail = subprocess.run(["tail", "-c", "3"], stdin=read.stdout, capture_output=True, check=True).stdout
    assert read.returncode == 0
    assert tail == b"end"
