"""aarch64 from one end to the other: built without running one foreign binary, booted, logged into, a
container from its hash in it. On another host all of it is emulated.

The kernel comes from the build cache, or takes its ten minutes.
"""

from __future__ import annotations

import io
import json
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import locked_packages

from hostos.build import cache, os_build
from hostos.build.engines.debian import DebianEngine
from hostos.build.profile import load_profile
from hostos.build.tree import Tree, from_package
from hostos.image.architecture import elf_machine
from hostos.machine import os_image
from hostos.steps import Steps

pytestmark = [pytest.mark.build, pytest.mark.timeout(3600)]
FOREIGN = os_image.host_arch() != "aarch64"
# Of the packages the OS is locked to: a Debian with a shell, its tools and Python.
PACKAGES = (
    "base-files", "busybox-static", "dash", "libc6", "libexpat1", "libpython3.13-minimal", "libpython3.13-stdlib",
    "python3.13-minimal", "zlib1g",
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> os_build.Os:
    return os_build.build(load_profile("default", "aarch64"), DebianEngine(), Steps(), tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def hostos(built: os_build.Os, hostos_with: Any) -> Iterator[Any]:
    with hostos_with(built.directory) as command:
        yield command


def debian(path: Path) -> Path:
    """A root file system of arm64 packages, as a tar archive; nothing of it is run here."""
    tree = Tree()
    for package in locked_packages(*PACKAGES, arch="aarch64"):
        for entry in from_package(package, lambda name: not name.startswith("usr/share/doc")):
            if not (stat.S_ISDIR(entry.mode) and entry.name.decode() in tree):
                tree.add(entry)
    for name in ("bin", "sbin", "lib"):
        tree.link(name, f"usr/{name}")
    for name in ("sh", "uname", "cat", "sha256sum", "id"):
        tree.link(f"usr/bin/{name}", "dash" if name == "sh" else "busybox")
    tree.link("usr/bin/python3", "python3.13")
    tree.file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
    tree.file("etc/group", "root:x:0:\n")
    for name in ("dev", "proc", "sys", "run", "tmp", "root"):
        tree.directory(name)
    with tarfile.open(path, "w") as archive:
        for entry in tree.sorted():
            info = tarfile.TarInfo(str(entry.path))
            info.mode = stat.S_IMODE(entry.mode)
            if stat.S_ISDIR(entry.mode):
                info.type = tarfile.DIRTYPE
            elif stat.S_ISLNK(entry.mode):
                info.type, info.linkname = tarfile.SYMTYPE, entry.data.decode()
            else:
                info.size = len(entry.data)
            archive.addfile(info, io.BytesIO(entry.data if info.isreg() else b""))
    return path


def test_the_build_is_for_arm(built: os_build.Os) -> None:
    manifest = json.loads((built.directory / "manifest.json").read_text())
    assert manifest["arch"] == "aarch64"
    assert manifest["cmdline"].startswith("console=ttyAMA0 ")
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == cache.file_digest(built.directory / name)
    assert set(manifest["files"]) == {"Image", "Image.gz", "initrd.cpio", "initrd.gz"}
    # Documentation/arch/arm64/booting.rst of Linux
    assert (built.directory / "Image").read_bytes()[0x38:0x3C] == b"ARMd"
    assert manifest["files"]["Image.gz"]["size"] + manifest["files"]["initrd.gz"]["size"] <= 38e6


def test_every_program_in_it_is_for_arm(built: os_build.Os) -> None:
    import gzip

    from hostos.build.size import members

    content = dict(members(gzip.decompress((built.directory / "initrd.gz").read_bytes())))
    machines = {elf_machine(data[:20]) for data in content.values() if data.startswith(b"\x7fELF")}
    assert machines - {None} == {"aarch64"}
    # Compiled by the Python of this machine's architecture, and nothing else of it is in there.
    assert "usr/lib/hostos/python/hostos/live/daemon.pyc" in content
    assert not [name for name in content if "x86_64" in name]


@pytest.mark.boot
def test_boot_ssh_container_and_power_button(hostos: Any, tmp_path: Path) -> None:
    up = hostos.up("--json").json()
    assert (up["state"], up["architecture"], up["failed_units"]) == ("running", "aarch64", [])
    if FOREIGN:
        assert up["accelerator"] == "tcg"
        assert up["accelerator_reason"] == f"an aarch64 guest on an {os_image.host_arch()} host is emulated"
    assert hostos("ssh", "--", "uname", "-m").ok().out == "aarch64\n"
    assert hostos("ssh", "--", "cat", "/proc/sys/kernel/tainted").ok().out == "0\n"
    assert hostos("ssh", "--", "ls /dev/hwrng /dev/fuse /dev/net/tun | wc -l").ok().out == "3\n"

    assert "rtc-pl031 9010000.pl031: setting system clock" in hostos("ssh", "--", "dmesg").ok().out

    image = hostos("image", "publish", debian(tmp_path / "arm.tar"), "--name", "debian-arm64").ok().out.strip()
    assert hostos("image", "inspect", "debian-arm64", "--json").json()["architecture"] == "aarch64"
    script = "uname -m; python3 -c 'import sys; print(sum(range(10)), sys.version_info[:2])'"
    assert hostos("container", "boot", image, "--", "sh", "-c", script).ok().out == "aarch64\n45 (3, 13)\n"

    # One hash for several architectures: handed over by this host, and by the hash alone from its seed.
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    (other / "bin/true").write_bytes(b"\x7fELF\2\1\1" + bytes(9) + bytes([2, 0, 62, 0]) + bytes(100))
    (other / "bin/true").chmod(0o755)
    hostos("image", "publish", other, "--name", "debian-amd64").ok()
    index = hostos("image", "index", "debian", "debian-amd64", "debian-arm64").ok().out.strip()
    assert hostos("container", "boot", "debian", "--", "uname", "-m").ok().out == "aarch64\n"
    assert hostos("container", "boot", "--bare", index, "--", "uname", "-m").ok().out == "aarch64\n"

    wrong = hostos("container", "boot", "debian-amd64", "--", "true")
    assert wrong.status == 2
    assert "image debian-amd64 is for x86_64, this machine is aarch64" in wrong.err
    assert "hostos up -m x86-64 --arch x86_64" in wrong.err

    stopped = hostos("down", "--json").json()
    assert (stopped["clean"], stopped["how"]) == (True, "power off over SSH")

    # Told by the machine's memory alone.
    again = hostos("up", "--json").json()
    assert (again["architecture"], again["os"]) == ("aarch64", up["os"])
    from hostos.machine.monitor import connect

    socket = hostos.home / "run" / "m" / "default" / "monitor.sock"
    with connect(socket, lambda: True, timeout=30) as monitor:
        monitor.execute("system_powerdown")
    for _ in range(600):
        if hostos("status", "--json").json()["state"] == "stopped":
            break
    assert hostos("status", "--json").json()["state"] == "stopped"
    assert "reboot: Power down" in hostos("logs").ok().out
