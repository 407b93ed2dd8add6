"""The kernel's configuration in a Buildroot build.

Our fragment says everything that is on; the rest must be off (`allnoconfig`), or a new kernel would
bring its defaults along. Buildroot takes a whole configuration file and runs `olddefconfig` on it,
which would do just that, so the whole file is made first, by the kernel's own Kconfig and with the
compiler that will be used, and Buildroot is given the result.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hostos.build import kconfig
from hostos.build.engines import buildroot_host
from hostos.build.engines.buildroot_config import PATCHES, make
from hostos.build.engines.buildroot_source import Source, kernel_hashes
from hostos.build.kernel import IMAGE, KERNEL_ARCH
from hostos.build.profile import Profile
from hostos.build.render import linux_config
from hostos.build.run import run
from hostos.errors import failure

CONFIG = "hostos.linux.config"


@dataclass(frozen=True)
class KernelTree:
    """Where Buildroot builds the kernel. `cross`: prefix of the compiler's and binutils' programs."""

    path: Path
    cross: str


def locate(source: Source, output: Path) -> KernelTree:
    """Ask Buildroot for the kernel's directory and compiler prefix."""
    shown = subprocess.run(
        [*make(source, output, "-s", "printvars"), "VARS=LINUX_DIR TARGET_CROSS"],
        capture_output=True,
        text=True,
        check=False,
        env=buildroot_host.full_environment(),
    ).stdout
    found = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    if not {"LINUX_DIR", "TARGET_CROSS"} <= found.keys():
        raise failure(f"Buildroot did not say where it builds the kernel:\n{shown[-500:]}", f"look at {output}/.config")
    return KernelTree(Path(found["LINUX_DIR"]), found["TARGET_CROSS"])


def record_hash(source: Source, output: Path, version: str) -> Path:
    """Make Buildroot check the kernel's archive; returns the directory for BR2_GLOBAL_PATCH_DIR.

    It looks for hashes in `linux/<version>/`, which exists for the versions of its own menu only. Of
    another version it takes the archive unchecked, also with BR2_DOWNLOAD_FORCE_CHECK_HASHES, although
    the hash is recorded in one of the files there. The internal toolchain takes its headers from the
    same archive.
    """
    patches = output / PATCHES
    for package in ("linux", "linux-headers"):
        (patches / package).mkdir(parents=True, exist_ok=True)
        (patches / package / f"{package}.hash").write_text(kernel_hashes(source, version))
    return patches


def write_config(profile: Profile, source: Source, output: Path, log: Path) -> Path:
    """Make the whole kernel configuration, and verify that it kept every requested symbol.

    The kernel's source must have been extracted and the toolchain built. The file is only touched
    when its content changes. Raises `UserError` naming a symbol that was lost and who asked for it.
    """
    target = output / CONFIG
    text = resolve(profile, locate(source, output), linux_config(profile), output, log)
    kconfig.verify(profile.kernel_options(), kconfig.parse_config(text), "the kernel's Kconfig")
    if not target.exists() or target.read_text() != text:
        target.write_text(text)
    return target


def resolve(profile: Profile, tree: KernelTree, fragment: str, output: Path, log: Path) -> str:
    """The whole configuration that the kernel's Kconfig makes of `fragment`, all else being off."""
    scratch = output / "hostos.linux.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    asked, made = scratch / "fragment", scratch / "config"
    asked.write_text(fragment)
    env = {**buildroot_host.environment(), "KCONFIG_ALLCONFIG": str(asked), "KCONFIG_CONFIG": str(made)}
    run(_make(profile, tree, "allnoconfig"), env=env, log=log)
    text = made.read_text()
    shutil.rmtree(scratch)
    return text


def savedefconfig(profile: Profile, tree: KernelTree, log: Path) -> str:
    """The symbols of the kernel directory's `.config` that differ from their defaults."""
    run(_make(profile, tree, "savedefconfig"), env=buildroot_host.environment(), log=log)
    saved = tree.path / "defconfig"
    text = saved.read_text()
    saved.unlink()
    return text


def _make(profile: Profile, tree: KernelTree, target: str) -> list[str | Path]:
    return ["make", "-C", tree.path, f"ARCH={KERNEL_ARCH[profile.arch]}", f"CROSS_COMPILE={tree.cross}", target]


def take(profile: Profile, source: Source, output: Path, result: Path, log: Path) -> str:
    """Put the built kernel's files into `result` and return its version (`uname -r`).

    Raises `UserError` when what Buildroot configured in the end lost a requested symbol.
    """
    tree = locate(source, output)
    final = (tree.path / ".config").read_text()
    kconfig.verify(profile.kernel_options(), kconfig.parse_config(final), "the kernel as Buildroot configured it")
    image = IMAGE[profile.arch]
    shutil.copy2(tree.path / "arch" / KERNEL_ARCH[profile.arch] / "boot" / image, result / image)
    run([f"{tree.cross}strip", "--strip-all", "-o", result / "vmlinux", tree.path / "vmlinux"], log=log)
    (result / "linux.config").write_text(final)
    return (tree.path / "include/config/kernel.release").read_text().strip()
