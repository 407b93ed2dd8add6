"""Programs that tests put into guests and containers, for the architecture of the OS under test."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hostos.build import lock
from hostos.build.debian_archive import Archive
from hostos.build.profile import load_profile
from hostos.build.tree import from_package
from hostos.machine import os_image
from hostos.steps import Step

REPOSITORY = Path(__file__).resolve().parent.parent
OS_DIRECTORY = Path(os.environ.get("HOSTOS_TEST_OS", REPOSITORY / "dist" / f"default-{os_image.host_arch()}"))


def architecture() -> str:
    """Of the OS that the tests boot; this host's if there is none."""
    name = OS_DIRECTORY.name.rpartition("-")[2]
    return name if name in os_image.ARCHITECTURES else os_image.host_arch()


def locked_packages(*names: str, arch: str) -> list[Path]:
    """Packages of the locked OS, from the cache or the mirror."""
    profile = load_profile("default", arch)
    wanted = lock.provides(lock.read(lock.lock_file(profile)), names)
    return Archive(profile.debian["suite"], arch).fetch(wanted, Step("test", lambda event: None))


def static_busybox(arch: str = "") -> bytes:
    """BusyBox that needs no library: this host's, or Debian's of another architecture. Skips without one."""
    arch = arch or architecture()
    if arch == os_image.host_arch():
        found = shutil.which("busybox")
        data = Path(found).read_bytes() if found else b""
        if not data or b"/ld-linux" in data or b"ld-musl" in data:
            pytest.skip("a statically linked busybox is not installed")
        return data
    (package,) = locked_packages("busybox-static", arch=arch)
    (entry,) = from_package(package, lambda path: path == "usr/bin/busybox")
    return entry.data
