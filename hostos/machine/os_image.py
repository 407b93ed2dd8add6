"""An OS build on disk: found, checked, and which of its files to boot."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostos.errors import UserError
from hostos.hostsystem import canonical, host_arch
from hostos.machine.files import Unreadable, read_json
from hostos.paths import data_dir

__all__ = ["ARCHITECTURES", "OsImage", "canonical", "find", "host_arch", "load", "verify"]

MANIFEST = "manifest.json"
KIND = "hostos-os"
BUILD_HINT = "build it: invoke build (or name one: --os DIR)"
ARCHITECTURES = ("x86_64", "aarch64")


@dataclass(frozen=True)
class OsImage:
    """A complete OS build. Paths are absolute; `cmdline` is the kernel command line it wants;
    `announces`: what the guest says on its virtio-serial port "hostos.agent"; `mounts`: what of the
    devices it is given it mounts by itself ("disk", "9p")."""

    directory: Path
    profile: str
    arch: str
    cmdline: str
    kernel_version: str
    min_memory_mib: int
    files: tuple[str, ...]
    announces: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    # A kernel and an initrd of another maker (hostos.machine.other_guest), instead of `files`.
    by_path: tuple[Path, Path] | None = None

    def kernel(self, accelerator: str) -> Path:
        """What QEMU boots: under TCG the plain ELF of x86 (PVH), which spares the guest unpacking it."""
        if self.by_path:
            return self.by_path[0]
        if self.arch == "aarch64":
            # An ELF gets no device tree from QEMU.
            return self.directory / "Image"
        preferred = ("vmlinux", "bzImage") if accelerator == "tcg" else ("bzImage", "vmlinux")
        return self.directory / next(name for name in preferred if name in self.files)

    def initrd(self, memory_mib: int) -> Path:
        """The archive as it is, where a machine with that memory has room for it beside what is unpacked from it:
        an emulated one boots 0.38 s sooner than with lz4, which in turn is 0.4 s quicker than gzip."""
        if self.by_path:
            return self.by_path[1]
        plain = self.directory / "initrd.cpio"
        if plain.name in self.files and memory_mib >= self.min_memory_mib + -(-plain.stat().st_size >> 20):
            return plain
        return self.directory / "initrd.gz"


def find(explicit: Path | None, *, arch: str | None = None, cwd: Path | None = None) -> OsImage:
    """The OS build to boot: `explicit`, else `default-ARCH` or the only build for `arch` in ./dist,
    else the same in the data directory. Raises UserError if there is none, no telling which, or it
    is incomplete."""
    arch = arch or host_arch()
    if explicit is not None:
        return load(explicit.expanduser())
    dist = (cwd or Path.cwd()) / "dist"
    for place in (dist, data_dir() / "os"):
        found = sorted(path for path in place.glob(f"*-{arch}") if path.is_dir())
        if len(found) == 1:
            return load(found[0])
        if found:
            named = [path for path in found if path.name == f"default-{arch}"]
            if named:
                return load(named[0])
            names = ", ".join(str(path) for path in found)
            raise UserError(f"there are several OS builds: {names}", "choose one: --os DIR")
    how = BUILD_HINT if arch == host_arch() else f"build it: invoke build --arch {arch} (or name one: --os DIR)"
    raise UserError(f"no OS build for {arch} in {dist} or {data_dir() / 'os'}", how)


def load(directory: Path) -> OsImage:
    """The OS build in `directory`. Raises UserError if it is not one, or not a complete one."""
    directory = directory.absolute()
    if not directory.is_dir():
        raise UserError(f"OS directory {directory} does not exist", BUILD_HINT)
    try:
        manifest = read_json(directory / MANIFEST)
    except Unreadable as error:
        raise UserError(f"OS build is damaged: {error}", BUILD_HINT) from error
    if manifest is None:
        raise UserError(f"{directory} is not a finished OS build: it has no {MANIFEST}", BUILD_HINT)
    if manifest.get("kind") != KIND:
        raise UserError(f"{directory / MANIFEST} does not describe an OS build", BUILD_HINT)
    try:
        image = _parse(directory, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{directory / MANIFEST} is incomplete ({error!r})", BUILD_HINT) from error
    _check_files(directory, manifest["files"])
    return image


def verify(image: OsImage) -> None:
    """Compare the files with the checksums of the manifest; raises UserError."""
    files = (read_json(image.directory / MANIFEST) or {})["files"]
    for name in image.files:
        with (image.directory / name).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != files[name].get("sha256"):
            raise UserError(f"OS build {image.directory} is damaged: {name} is not what was built", BUILD_HINT)


def _parse(directory: Path, manifest: dict[str, Any]) -> OsImage:
    files = manifest["files"]
    for name, facts in files.items():
        if not re.fullmatch(r"\w[\w.-]*", name) or type(facts["size"]) is not int:
            raise ValueError(f"file {name!r}")
    bootable = {"Image"} if manifest["arch"] == "aarch64" else {"bzImage", "vmlinux"}
    if not bootable & files.keys() or "initrd.gz" not in files:
        raise ValueError("no kernel or no initrd listed")
    texts = [manifest[key] for key in ("profile", "arch", "cmdline", "kernel_version")]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("profile, arch, cmdline, kernel_version must be texts")
    profile, arch, cmdline, kernel_version = texts
    floor = manifest["min_memory_mib"]
    if type(floor) is not int:
        raise TypeError("min_memory_mib must be a number")
    return OsImage(
        directory,
        profile,
        arch,
        cmdline,
        kernel_version,
        floor,
        tuple(sorted(files)),
        tuple(str(each) for each in manifest.get("announces", ())),
        tuple(str(each) for each in manifest.get("mounts", ())),
    )


def _check_files(directory: Path, files: dict[str, Any]) -> None:
    for name, facts in files.items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            raise UserError(f"OS build {directory} is half-built: {name}: {error.strerror}", BUILD_HINT) from None
        if size != facts["size"]:
            raise UserError(
                f"OS build {directory} is half-built: {name} has {size} bytes, not {facts['size']}",
                BUILD_HINT,
            )
