"""Trees, archives and homes for the image tests."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandboxes import scratch

from hostos.image import seeding
from hostos.steps import Event, Steps


def elf(machine: int = 62, kind: int = 3) -> bytes:
    """The beginning of a little-endian ELF file."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", kind, machine, 1) + bytes(40)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty HOSTOS_HOME; a seed started in it is stopped afterwards."""
    path = tmp_path / "home"
    monkeypatch.setenv("HOSTOS_HOME", str(path))
    yield path
    seeding.stop()


class Listener:
    """Steps that remember what they were told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.steps = Steps(self.events.append)

    @property
    def warnings(self) -> list[str]:
        return [event.detail for event in self.events if event.kind == "warning"]


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree that anybody can make: a program, texts, links, an empty directory, odd names."""
    root = tmp_path / "tree"
    (root / "usr/bin").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o755)
    (root / "usr/bin/prog").write_bytes(elf() + os.urandom(300_000))
    (root / "usr/bin/prog").chmod(0o755)
    (root / "etc").mkdir()
    (root / "etc/motd").write_text("hello\n" * 1000)
    os.link(root / "etc/motd", root / "etc/motd.again")
    (root / "link").symlink_to("etc/motd")
    os.mkfifo(root / "pipe", 0o622)
    for name in (b"new\nline", b"\xff\xfe", b'-rf "q" \\ x', "grüße".encode(), b"n" * 255):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(name)
    for path in [root, *root.rglob("*")]:
        os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    return root


PROGRAMS = ("sh", "id", "cat", "rm", "mkdir", "mv", "chown", "chmod", "touch", "echo", "date", "false", "wget")


@pytest.fixture
def workshop(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where images can be built in a sandbox: with `tree`, in which there is a shell."""
    busybox = Path("/bin/busybox")
    if not busybox.exists():
        pytest.skip("needs busybox-static")
    if os.geteuid() != 0 and not shutil.which("newuidmap"):
        pytest.skip("needs newuidmap (uidmap)")
    with scratch(monkeypatch):
        tree = tmp_path / "tree"
        for name in ("bin", "etc", "usr/share/gone", "usr/share/renamed"):
            (tree / name).mkdir(parents=True)
        shutil.copy(busybox, tree / "bin/busybox")
        for name in PROGRAMS:
            (tree / "bin" / name).symlink_to("busybox")
        (tree / "usr/share/gone/old").write_text("old")
        (tree / "usr/share/renamed/kept").write_text("kept")
        yield tmp_path
