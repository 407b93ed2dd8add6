"""OCI images to import, made with umoci."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

TAG = "bench"
FILES, SIZE = 40, 500_000


def write(layout: Path, layers: Sequence[Path]) -> None:
    """A layout with one image, tagged `bench`, whose layers are these tar archives (compressed with gzip)."""
    subprocess.run(["umoci", "init", "--layout", layout], check=True)
    subprocess.run(["umoci", "new", "--image", f"{layout}:{TAG}"], check=True)
    for layer in layers:
        subprocess.run(["umoci", "raw", "add-layer", "--image", f"{layout}:{TAG}", layer], check=True)


def noise(path: Path) -> Path:
    """A second layer: files that no compression makes smaller, and a whiteout."""
    with tarfile.open(path, "w") as archive:
        for number in range(FILES):
            info = tarfile.TarInfo(f"srv/noise{number}")
            info.size = SIZE
            archive.addfile(info, BytesIO(os.urandom(SIZE)))
        archive.addfile(tarfile.TarInfo("usr/share/.wh.doc"))
    return path
