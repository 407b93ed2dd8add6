"""Compiling the kernel from Debian's kernel source with our configuration."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hostos.build import cache, kconfig
from hostos.build.profile import Profile
from hostos.build.render import linux_config
from hostos.build.run import require, run
from hostos.errors import UserError
from hostos.steps import Step

# What the kernel calls our architectures, its image target, and where that image appears.
KERNEL_ARCH = {"x86_64": "x86", "aarch64": "arm64"}
IMAGE = {"x86_64": "bzImage", "aarch64": "Image"}
CROSS = {"x86_64": "x86_64-linux-gnu-", "aarch64": "aarch64-linux-gnu-"}

# About what a build of the default profile compiles; only for the progress display.
OBJECTS = 1950
# Source, objects and result, with room to spare.
DISK_NEEDED = 4 << 30


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. `image` is what any hypervisor boots (bzImage or Image), `vmlinux` the
    stripped ELF that QEMU starts without decompressing, `config` the final .config."""

    version: str
    image: Path
    vmlinux: Path
    config: Path


def build(profile: Profile, source_package: Path, step: Step) -> Kernel:
    """Compile the kernel of `profile`, or take it from the cache.

    `source_package`: Debian's linux-source .deb. Raises `UserError` when a requested symbol did not
    survive, a tool is missing or the compilation fails.
    """
    fragment = linux_config(profile)
    key = cache.digest(
        {
            "source": cache.file_digest(source_package),
            "config": fragment,
            "arch": profile.arch,
            "compiler": compiler_version(profile.arch),
            "code": cache.code_digest(sys.modules[__name__]),
        }
    )
    if found := cache.find("kernel", key):
        step.detail = "cached"
        return _kernel(found, profile.arch)
    with cache.alone("kernel", step):
        # Whoever was waited for may have made it.
        if cache.find("kernel", key) is None:
            _make_kernel(profile, source_package, fragment, key, step)
    path = cache.find("kernel", key)
    assert path is not None
    return _kernel(path, profile.arch)


def _make_kernel(profile: Profile, source_package: Path, fragment: str, key: str, step: Step) -> None:
    _check_disk()
    source = unpack_source(source_package, step)
    work = cache.root() / "kernel-work" / f"{source.name}-{profile.arch}"
    work.mkdir(parents=True, exist_ok=True)
    log = work / "build.log"
    log.unlink(missing_ok=True)
    configure(profile, source, work, fragment, log)
    _compile(profile.arch, source, work, log, step)
    with cache.create("kernel", key) as result:
        arch = KERNEL_ARCH[profile.arch]
        shutil.copy2(work / "arch" / arch / "boot" / IMAGE[profile.arch], result / IMAGE[profile.arch])
        run([f"{_cross(profile.arch)}strip", "--strip-all", "-o", result / "vmlinux", work / "vmlinux"], log=log)
        shutil.copy2(work / ".config", result / "linux.config")
        release = (work / "include/config/kernel.release").read_text().strip()
        (result / "version").write_text(release + "\n")


def configure(profile: Profile, source: Path, work: Path, fragment: str, log: Path) -> None:
    """Write `work/.config` from the fragment over allnoconfig, and verify that it kept everything."""
    require("make", "gcc", "bison", "flex", "bc", "ld", "perl")
    asked = work / "hostos.config"
    asked.write_text(fragment)
    run(_make(profile.arch, source, work, "allnoconfig"), log=log, env={**_env(), "KCONFIG_ALLCONFIG": str(asked)})
    got = kconfig.parse_config((work / ".config").read_text())
    kconfig.verify(profile.kernel_options(), got, "the kernel's Kconfig")


def unpack_source(package: Path, step: Step) -> Path:
    """The kernel source of a linux-source package, unpacked once into the build cache."""
    name = package.name.removesuffix(".deb")
    parent = cache.root() / "kernel-source"
    target = parent / name
    if target.is_dir():
        return target
    require("dpkg-deb", "tar", "xz")
    step.progress("unpacking the source")
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir(parents=True)
    partial = parent / f".{name}"
    partial.mkdir()
    run(["dpkg-deb", "--extract", package, partial / "deb"])
    tarballs = list((partial / "deb/usr/src").glob("linux-source-*.tar.xz"))
    if len(tarballs) != 1:
        raise UserError(f"{package.name} does not hold a kernel source tarball", "invoke build --update")
    run(["tar", "--extract", "--file", tarballs[0], "--directory", partial, "--strip-components=1"])
    shutil.rmtree(partial / "deb")
    partial.rename(target)
    return target


def compiler_version(arch: str) -> str:
    """The compiler's and linker's own version lines: part of the cache key."""
    require("gcc", "ld")
    lines = []
    for tool in (f"{_cross(arch)}gcc", f"{_cross(arch)}ld"):
        shown = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
        lines.append(shown.partition("\n")[0])
    return "; ".join(lines)


def _compile(arch: str, source: Path, work: Path, log: Path, step: Step) -> None:
    count = 0

    def watch(line: str) -> None:
        nonlocal count
        if re.match(r"\s+(CC|AS|HOSTCC|AR|LD)\s", line):
            count += 1
            if count % 20 == 0:
                step.progress(f"{min(99, 100 * count // OBJECTS)} %  {line.split()[-1]}")

    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    run([*_make(arch, source, work, IMAGE[arch]), f"-j{jobs}"], log=log, env=_env(), on_line=watch)


def _make(arch: str, source: Path, work: Path, target: str) -> list[str | Path]:
    command: list[str | Path] = ["make", "-C", source, f"O={work}", f"ARCH={KERNEL_ARCH[arch]}"]
    if cross := _cross(arch):
        command.append(f"CROSS_COMPILE={cross}")
    return [*command, target]


def _cross(arch: str) -> str:
    return "" if os.uname().machine == arch else CROSS[arch]


def _env() -> dict[str, str]:
    # Same inputs, same bytes: https://docs.kernel.org/kbuild/reproducible-builds.html
    return {
        "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
        "KBUILD_BUILD_USER": "hostos",
        "KBUILD_BUILD_HOST": "hostos",
        "KBUILD_BUILD_VERSION": "1",
        "LC_ALL": "C.UTF-8",
    }


def _check_disk() -> None:
    cache.root().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache.root()).free
    if free < DISK_NEEDED:
        raise UserError(
            f"compiling the kernel needs {DISK_NEEDED >> 30} GiB in {cache.root()}, {free / 2**30:.1f} GiB are free",
            "free some room, or move the cache: HOSTOS_HOME=<directory> invoke build",
        )


def _kernel(path: Path, arch: str) -> Kernel:
    return Kernel(
        version=(path / "version").read_text().strip(),
        image=path / IMAGE[arch],
        vmlinux=path / "vmlinux",
        config=path / "linux.config",
    )
