"""The Debian engine: binary packages unpacked (never installed) plus a kernel compiled from Debian's
kernel source. No maintainer script runs, nothing needs root."""

from __future__ import annotations

import pickle
import platform
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import translate
from posixpath import basename, dirname

from hostos.build import bytecode, cache, elf, kernel, load_order, lock
from hostos.build import tree as trees
from hostos.build.engines import Built, Component
from hostos.build.lock import Locked
from hostos.build.profile import Profile
from hostos.build.render import linux_config
from hostos.build.run import require
from hostos.build.tree import Tree
from hostos.cpio import Entry
from hostos.steps import Step, Steps

PROGRAM_DIRECTORIES = ("usr/bin", "usr/sbin")
UNITS = "usr/lib/systemd/system"
HELPERS = "usr/lib/systemd"


@dataclass(frozen=True)
class DebianEngine:
    """`update` renews the lock, `locked` refuses to leave it."""

    update: bool = False
    locked: bool = False
    name: str = "debian"

    def build(self, profile: Profile, steps: Steps) -> Built:
        require_compiler(profile.arch)
        obtained = lock.obtain(profile, steps, update=self.update, locked=self.locked)
        with steps.step("kernel") as step:
            compiled = kernel.build(profile, obtained.kernel_source, step)
            step.detail = ", ".join(filter(None, (compiled.version, step.detail)))
        with steps.step("root file system") as step:
            tree = root_tree(profile, obtained, step)
        skipped = _skipped(profile)
        packages = [*obtained.lock.root, obtained.lock.kernel]
        return Built(
            kernel_version=compiled.version,
            image=compiled.image,
            vmlinux=compiled.vmlinux,
            tree=tree,
            components=tuple(
                Component(each.name, each.version, "debian", each.source, each.sha256)
                for each in packages
                if each.name not in skipped
            ),
            configs={
                "linux.fragment": linux_config(profile),
                "linux.config": compiled.config.read_text(),
                "packages.lock.json": obtained.lock.to_json(),
            },
            compile_python=lambda client: bytecode.compile_modules(client, obtained.interpreter),
            provenance={"suite": obtained.lock.suite, "compiler": kernel.compiler_version(profile.arch)},
        )


def root_tree(profile: Profile, obtained: Locked, step: Step) -> Tree:
    """The root tree of `profile` before fix-ups and overlay, or the cached one."""
    key = cache.digest(
        {
            "packages": [package.sha256 for package in obtained.lock.root],
            "features": [feature.file.read_text() for feature in profile.features],
            "arch": profile.arch,
            "code": cache.code_digest(sys.modules[__name__], trees, elf, load_order, bytecode),
        }
    )
    if found := cache.find("root", key):
        step.detail = "cached"
        # Our own cache in the user's own directory, written below: as trustworthy as this program.
        return Tree(pickle.loads((found / "tree.pickle").read_bytes()))
    tree = Tree()
    units = {unit for feature in profile.features for unit in feature.debian.units}
    helpers = {name for feature in profile.features for name in feature.debian.helpers}
    dropped = re.compile("|".join(f"(?:{translate(each)})" for each in _drops(profile)))
    skipped = _skipped(profile)
    keep = {name: set(programs) for feature in profile.features for name, programs in feature.debian.keep.items()}
    for package, file in zip(obtained.lock.root, obtained.files, strict=True):
        if package.name in skipped:
            continue
        step.progress(package.name)
        programs = keep.get(package.name)
        for entry in trees.from_package(file, _wanted(dropped, programs, units, helpers)):
            if stat.S_ISDIR(entry.mode) and entry.name.decode() in tree:
                continue
            tree.add(entry)
    _tidy(tree)
    if any(feature.debian.python for feature in profile.features):
        step.progress("Python byte code")
        bytecode.compile_modules(tree, obtained.interpreter)
    step.progress("libraries")
    kept = [name for feature in profile.features for name in feature.debian.libraries]
    for path in elf.unneeded_libraries(tree, kept):
        del tree.entries[path]
    load_order.unify(tree)
    _remove_empty_directories(tree)
    with cache.create("root", key) as result:
        (result / "tree.pickle").write_bytes(pickle.dumps(tree.entries))
    return tree


def require_compiler(arch: str) -> None:
    """Raises `UserError` naming the packages of what compiles a kernel for `arch`, before minutes are spent
    on anything else."""
    prefix = "" if platform.machine() == arch else kernel.CROSS[arch]
    require("make", "gcc", f"{prefix}gcc", f"{prefix}ld")


def _skipped(profile: Profile) -> set[str]:
    return {name for feature in profile.features for name in feature.debian.skip}


def _drops(profile: Profile) -> list[str]:
    return [pattern for feature in profile.features for pattern in feature.debian.drop]


def _wanted(
    dropped: re.Pattern[str], programs: set[str] | None, units: set[str], helpers: set[str]
) -> Callable[[str], bool]:
    def wanted(path: str) -> bool:
        if any(dropped.match(each) for each in (path, *trees.parents(path))):
            return False
        parent, name = dirname(path), basename(path)
        if parent in PROGRAM_DIRECTORIES:
            return programs is None or name in programs
        if parent == UNITS:
            return name in units or name.endswith((".d", ".wants"))
        if parent == HELPERS and name.startswith("systemd"):
            return name in helpers
        # What starts by itself is decided by the overlay, not by packages.
        return dirname(parent) != UNITS

    return wanted


def _tidy(tree: Tree) -> None:
    for path, entry in list(tree.entries.items()):
        if stat.S_ISLNK(entry.mode) and path.startswith(UNITS) and tree.resolve(path) not in tree:
            del tree.entries[path]
    python = next((path for path in tree.entries if path.startswith("usr/bin/python3.")), None)
    if python:
        tree.link("usr/bin/python3", basename(python))


def _remove_empty_directories(tree: Tree) -> None:
    used: set[str] = set()
    for path, entry in tree.entries.items():
        if not stat.S_ISDIR(entry.mode):
            used.update(trees.parents(path))

    def keep(path: str, entry: Entry) -> bool:
        return not stat.S_ISDIR(entry.mode) or path in used

    tree.filter(keep)
