from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of its own for each test, short enough for the sockets to lie in it."""
    with tempfile.TemporaryDirectory(prefix="h-") as place:
        monkeypatch.setenv("HOSTOS_HOME", f"{place}/home")
        monkeypatch.delenv("HOSTOS_TIMEOUT_SCALE", raising=False)
        yield Path(place) / "home"


@pytest.fixture
def make_os(tmp_path: Path) -> Callable[..., Path]:
    """Writes an OS directory with the layout of a real one (and content that boots nothing)."""

    def make(directory: Path | None = None, **changes: Any) -> Path:
        directory = directory or tmp_path / "os"
        directory.mkdir(parents=True, exist_ok=True)
        contents = {"bzImage": b"bz", "vmlinux": b"elf-kernel", "initrd.gz": b"gz", "initrd.cpio": b"cpio"}
        for name, data in contents.items():
            (directory / name).write_bytes(data)
        manifest: dict[str, Any] = {
            "schema": 1,
            "kind": "hostos-os",
            "profile": "default",
            "arch": "x86_64",
            "kernel_version": "6.12.1",
            "cmdline": "console=ttyS0 quiet",
            "min_memory_mib": 160,
            "files": {name: {"size": len(data), "sha256": "0" * 64} for name, data in contents.items()},
        }
        manifest |= changes
        (directory / "manifest.json").write_text(json.dumps(manifest))
        return directory

    return make
