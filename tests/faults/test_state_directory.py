"""Where a machine keeps its files: read-only, full, with a long name or spaces. Each has one defined outcome."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.boot, pytest.mark.fault]

needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


@contextlib.contextmanager
def read_only(place: Path) -> Iterator[None]:
    """For whoever opens something from here on; what is open stays writable, and would forbid a plain remount."""
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        remount(place, "ro,bind")
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def is_clear(failed: Any, *says: str) -> None:
    assert "Traceback" not in failed.err
    assert "HOSTOS_HOME=" in failed.err
    for each in says:
        assert each in failed.err, failed.err


@needs_mounts
def test_read_only_from_the_beginning(hostos: Any) -> None:
    with mounted(hostos.home, "ro"):
        for command in (["up", "--os", hostos.os_dir], ["up", "--dry-run", "--os", hostos.os_dir]):
            failed = hostos(*command)
            assert failed.status in (1, 2), command
            is_clear(failed, "Read-only file system")
        assert hostos("ls", "--json").json() == []
        assert hostos.qemus() == []


@needs_mounts
def test_read_only_later(hostos: Any) -> None:
    """As after a fault of the disk: what can be told is told, what would have to be written is refused."""
    with mounted(hostos.home, "size=400M"):
        hostos.up("--memory", "192").ok()
        with read_only(hostos.home):
            assert hostos("status", "--json").json()["state"] == "running"
            assert hostos("ls").status == 0
            assert hostos("ssh", "--", "echo fine").ok().out == "fine\n"
            for command in (["down"], ["suspend"], ["restart"], ["rm", "--force", "default"]):
                failed = hostos(*command)
                assert failed.status == 1, (command, failed.err)
                is_clear(failed, "Read-only file system")
            assert hostos("status", "--json").json()["state"] == "running"
        assert hostos("down", "--json").json()["clean"] is True
        with read_only(hostos.home):
            failed = hostos.up()
            assert failed.status == 1
            is_clear(failed, "Read-only file system")
            assert hostos.qemus() == []
            assert hostos("status", "--json").json()["state"] == "stopped"


@needs_mounts
def test_no_room_for_the_initrd(hostos: Any) -> None:
    with mounted(hostos.home, "size=1M"):
        failed = hostos.up()
        assert failed.status == 1
        is_clear(failed, "No space left on device")
        assert hostos.qemus() == []
        assert not (hostos.directory() / "initrd").exists()
        assert not list(hostos.directory().glob(".*"))
        # Room is made: it works, in the same place.
        remount(hostos.home, "size=400M")
        assert hostos.up("--memory", "192", "--json").json()["state"] == "running"


@needs_mounts
def test_full_while_it_runs(hostos: Any) -> None:
    """The machine goes on; it can be asked, used and ended; saving it is refused."""
    with mounted(hostos.home, "size=400M"):
        hostos.up("--memory", "192").ok()
        filler = hostos.home / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as out:
            while True:
                out.write(bytes(1 << 16))
        assert shutil.disk_usage(hostos.home).free < 1 << 16
        assert hostos("status", "--json").json()["state"] == "running"
        assert hostos("ssh", "--", "echo fine").ok().out == "fine\n"
        failed = hostos("suspend")
        assert failed.status in (1, 2)
        assert "Traceback" not in failed.err
        assert hostos("status", "--json").json()["state"] == "running"
        assert hostos("down", "--json").json()["clean"] is True
        filler.unlink()
        assert hostos.up("--json").json()["state"] == "running"


@pytest.mark.parametrize(
    "name",
    ["long" * 30, "with a few spaces", 'quotes\' and "commas", equals=', "ünïcödé ☃"],
    ids=["120 characters", "spaces", "quotes and commas", "not ASCII"],
)
def test_names_of_directories(os_dir: Path, hostos: Any, name: str) -> None:
    """Sockets of a long one move to a short private directory; nothing else minds."""
    home = hostos.home.parent / name
    assert len(str(home)) > 120 or len(name) < 40
    other = type(hostos)(home, os_dir)
    try:
        up = other.up("--memory", "192", "--json").json()
        assert up["state"] == "running"
        assert other("ssh", "--", "echo fine").ok().out == "fine\n"
        # As a person would type it, and by the generated configuration.
        shown = subprocess.run(
            ["ssh", "-F", up["ssh"]["config"], "hostos-default", "hostname"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert shown.stdout == "default\n", shown.stderr
        assert other("down", "--json").json()["clean"] is True
    finally:
        other.clean_up()
        for path in Path("/tmp").glob(f"hostos-{os.getuid()}-*"):
            with contextlib.suppress(OSError):
                (path / "m").rmdir()
                path.rmdir()
