"""A peer for the boot benchmark: Debian's own cloud kernel with our initrd.

It says how much of the time to SSH is the kernel's and how much the system's. Debian's kernel has its
virtio drivers as modules; they are appended to the initrd and loaded just before DHCP.
"""

from __future__ import annotations

import io
import json
import lzma
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.harness import digest
from hostos import cpio
from hostos.build.debian_archive import Archive
from hostos.errors import failure
from hostos.machine import os_image
from hostos.machine.identity import combine_initrd
from hostos.machine.options import DEFAULT_MEMORY_MIB
from hostos.steps import Steps

PACKAGE = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_net", "af_packet")
# QEMU 7.2's emulation of cmpxchg16b crashes Debian's kernel; newer ones don't need this.
CPU = "max,-cx16"


def make(ours: os_image.OsImage, target: Path, steps: Steps) -> Path:
    """An OS directory with Debian's kernel and our initrd, for `hostos up --os`. Raises UserError."""
    with steps.step("Debian's cloud kernel") as step, tempfile.TemporaryDirectory() as scratch:
        archive = Archive("trixie", "x86_64")
        archive.update(step)
        # The package of that name only depends on the current one.
        packages = archive.resolve([PACKAGE])
        package = next((each for each in packages if each.name.endswith("-cloud-amd64") and each.name != PACKAGE), None)
        if package is None:
            raise failure(f"{PACKAGE} depends on no kernel", "invoke bench.boot again later")
        (deb,) = archive.fetch([package], step)
        subprocess.run(["dpkg-deb", "-x", deb, scratch], check=True)
        (kernel,) = Path(scratch, "boot").glob("vmlinuz-*")
        version = kernel.name.removeprefix("vmlinuz-")
        target.mkdir(parents=True)
        shutil.copy(kernel, target / "bzImage")
        # Whatever its form: by that name the launcher takes it in any case.
        combine_initrd(ours.initrd(DEFAULT_MEMORY_MIB), _modules(Path(scratch), version), target / "initrd.gz")
        manifest = json.loads((ours.directory / os_image.MANIFEST).read_text())
        manifest |= {"profile": "cloud-kernel", "kernel_version": version}
        manifest["files"] = {
            name: {"size": (target / name).stat().st_size, "sha256": digest(target / name)}
            for name in ("bzImage", "initrd.gz")
        }
        # The port on which our guest says that its network is up needs another driver: SSH is probed.
        del manifest["announces"]
        (target / os_image.MANIFEST).write_text(json.dumps(manifest))
        step.detail = version
    return target


def _modules(root: Path, version: str) -> bytes:
    """An archive with the drivers, and what loads them."""
    if not (root / "lib").exists():
        # Where older tools look.
        (root / "lib").symlink_to("usr/lib")
    subprocess.run(["depmod", "-b", root, version], check=True)
    files: list[str] = []
    for name in MODULES:
        shown = subprocess.run(
            ["modprobe", "-d", root, "-S", version, "--show-depends", name], capture_output=True, text=True, check=True
        ).stdout
        files += [line.split()[1] for line in shown.splitlines() if line.startswith("insmod ")]
    entries = [cpio.directory("hostos-modules")]
    script = "[Service]\n"
    for path in dict.fromkeys(files):
        inside = "hostos-modules/" + Path(path).name.removesuffix(".xz")
        data = Path(path).read_bytes()
        entries.append(cpio.file(inside, lzma.decompress(data) if path.endswith(".xz") else data))
        script += f"ExecStartPre=/bin/busybox insmod /{inside}\n"
    drop_in = "etc/systemd/system/hostos-dhcp.service.d"
    entries += [cpio.directory(drop_in), cpio.file(f"{drop_in}/modules.conf", script.encode())]
    out = io.BytesIO()
    cpio.write_newc(entries, out)
    return out.getvalue()
