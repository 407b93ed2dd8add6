"""Trees larger than they usually are: a file beyond 4 GiB, and a directory of 20,000 files, exact to the last."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostos.image import overlay
from hostos.image.layers import read_layer
from hostos.image.pack import pack
from hostos.steps import Steps

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not shutil.which("tar2sqfs"), reason="needs tar2sqfs (squashfs-tools-ng)"),
]

FILES = 20_000
BEYOND = 5 << 30


def test_a_directory_of_very_many_files(tmp_path: Path) -> None:
    source = tmp_path / "many.tar"
    with tarfile.open(source, "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(FILES):
            info = tarfile.TarInfo(f"many/{number:06}")
            info.size, info.uid, info.mtime = 6, number % 70_000, number
            archive.addfile(info, io.BytesIO(f"{number:06}".encode()))
    pack(source, tmp_path / "layer", Steps(), architecture="x86_64")
    with ExitStack() as stack:
        entries = read_layer(tmp_path / "layer", stack)
        files = [entry for entry in entries if entry.is_file]
        assert len(files) == FILES
        assert [(e.path, e.uid, e.mtime, e.size) for e in files] == [
            (b"many/%06d" % n, n % 70_000, n, 6) for n in range(FILES)
        ]
        # Contents, of every thousandth.
        assert all(entry.read(6) == entry.path[-6:] for entry in files[::1000])
        tree = overlay.merge([entries])
        assert overlay.difference(tree, tree) == []


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
