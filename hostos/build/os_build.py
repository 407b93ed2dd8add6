"""One build, start to end: profile -> engine -> finished tree -> `dist/<profile>-<arch>/`."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostos import __version__, cpio
from hostos.build import cache, initrd, sbom
from hostos.build import tree as trees
from hostos.build.engines import Built, Engine
from hostos.build.kernel import IMAGE
from hostos.build.profile import Profile
from hostos.cpio import Entry
from hostos.errors import UserError
from hostos.steps import Steps

SCHEMA = 1
# What a booted guest needs besides its files: kernel, page tables, PID 1, journal, sshd. Measured by
# booting with less and less (docs/build.md).
MEMORY_BESIDES_FILES = 72 << 20
# The launcher's command line gives the root file system this share of the memory.
ROOT_SHARE = 0.85


@dataclass(frozen=True)
class Os:
    """A finished build: its directory and its manifest (docs/build.md has the fields)."""

    directory: Path
    manifest: Mapping[str, Any]


def build(profile: Profile, engine: Engine, steps: Steps, dist: Path) -> Os:
    """Build `profile` into `dist/<profile>-<arch>/`, replacing what is there only at the very end.

    Raises `UserError` for anything foreseeable; `dist` is then as it was.
    """
    if platform.system() != "Linux":
        raise UserError(
            "the OS is built on Linux: with Debian's tools, and in a file system that tells a from A",
            "build it in a machine (hostos's own or Vagrant's), or fetch one: docs/macos.md",
        )
    _check_writable(dist)
    built = engine.build(profile, steps)
    with steps.step("initrd") as step:
        tree = initrd.complete(built.tree, _client(built, profile), profile)
        key = cache.digest({"tree": _tree_digest(tree), "code": cache.code_digest(initrd, trees, cpio)})
        packed = cache.find("initrd", key)
        if packed is not None:
            step.detail = "cached"
        else:
            step.progress("packing")
            with cache.create("initrd", key) as result:
                unpacked = initrd.pack(tree, result / "initrd.cpio")
                step.progress("compressing")
                initrd.compress(result / "initrd.cpio", result / "initrd.gz")
                (result / "unpacked").write_text(str(unpacked))
            packed = cache.find("initrd", key)
            assert packed is not None
    with steps.step("dist") as step, cache.alone("dist", step):
        result_os = _write_dist(profile, engine.name, built, packed, dist, reseeds="usr/bin/socat" in tree)
        step.detail = _sizes(result_os.manifest)
    return result_os


def _client(built: Built, profile: Profile) -> list[Entry]:
    if built.compile_python is None or not any(feature.name == "live" for feature in profile.features):
        return []
    client = trees.Tree()
    for entry in initrd.live_client():
        client.add(entry)
    built.compile_python(client)
    return list(client.entries.values())


def _write_dist(profile: Profile, engine: str, built: Built, packed: Path, dist: Path, *, reseeds: bool) -> Os:
    dist.mkdir(parents=True, exist_ok=True)
    target = dist / profile.target
    partial = dist / f".{profile.target}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for name, source in (
            *kernel_files(profile.arch, built),
            ("initrd.gz", packed / "initrd.gz"),
            ("initrd.cpio", packed / "initrd.cpio"),
        ):
            shutil.copyfile(source, partial / name)
        if profile.arch == "aarch64":
            _gzip(partial / "Image", partial / "Image.gz")
        files = {
            path.name: {"size": path.stat().st_size, "sha256": cache.file_digest(path)}
            for path in sorted(partial.iterdir())
        }
        (partial / "config").mkdir()
        for name, text in built.configs.items():
            (partial / "config" / name).write_text(text)
        unpacked = int((packed / "unpacked").read_text())
        manifest = {
            "schema": SCHEMA,
            "kind": "hostos-os",
            "hostos": __version__,
            "profile": profile.name,
            "arch": profile.arch,
            "engine": engine,
            "kernel_version": built.kernel_version,
            "cmdline": profile.cmdline,
            # What the guest says on its port "hostos.agent" (overlay/usr/lib/hostos/dhcp-lease, identity);
            # "reseed": a clone renews its random numbers with or without a generation ID (socat does it).
            "announces": ["network", "identity", *(["reseed"] if reseeds else [])],
            # What it mounts: devices of the machine (overlay/usr/lib/hostos/devices), an image as its root (…/root).
            "mounts": ["disk", "9p", *(["root"] if any(each.name == "live" for each in profile.features) else [])],
            "files": files,
            "unpacked": unpacked,
            "min_memory_mib": min_memory_mib(unpacked),
            "features": [feature.name for feature in profile.features],
            "packages": {each.name: each.version for each in built.components},
            "provenance": built.provenance,
        }
        (partial / "sbom.cdx.json").write_text(sbom.cyclonedx(profile, built))
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Os(target, manifest)


def kernel_files(arch: str, built: Built) -> list[tuple[str, Path]]:
    """What hypervisors boot. On x86_64 also the plain ELF, which QEMU starts by PVH: the guest need not
    unpack it. An arm64 Image is not compressed in the first place, and as an ELF QEMU would start it
    without a device tree."""
    image = (IMAGE[arch], built.image)
    return [image, ("vmlinux", built.vmlinux)] if arch == "x86_64" else [image]


def _gzip(path: Path, compressed: Path) -> None:
    """The form to download, which QEMU and boot loaders take, too; no name and no time in the header."""
    with path.open("rb") as source, compressed.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as sink:
        shutil.copyfileobj(source, sink)


def min_memory_mib(unpacked: int) -> int:
    """The least memory the OS boots in, in MiB, rounded up to 16: its files take `unpacked` bytes of
    it and may take no more than the root file system's share."""
    needed = max(unpacked / ROOT_SHARE, unpacked + MEMORY_BESIDES_FILES)
    return -(-int(needed) // (16 << 20)) * 16


def _replace(partial: Path, target: Path) -> None:
    """Put `partial` where `target` is. A machine that runs from `target` keeps its open files."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _tree_digest(tree: trees.Tree) -> str:
    return cache.digest({"entries": [_entry_digest(entry) for entry in tree.sorted()]})


def _entry_digest(entry: Entry) -> list[str]:
    return [os.fsdecode(entry.name), oct(entry.mode), str(entry.rdev), hashlib.sha256(entry.data).hexdigest()]


def _check_writable(dist: Path) -> None:
    nearest = dist
    while not nearest.exists():
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK):
        raise UserError(f"{nearest} is not writable", "choose another place: invoke build --dist <directory>")


def _sizes(manifest: Mapping[str, Any]) -> str:
    files = manifest["files"]
    shown = [name for name in ("bzImage", "Image", "Image.gz", "initrd.gz") if name in files]
    return ", ".join(f"{name} {files[name]['size'] / 1e6:.1f} MB" for name in shown)
