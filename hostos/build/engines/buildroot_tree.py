"""Buildroot's root file system -> the same tree the Debian engine makes.

Buildroot installs whole packages; which programs, units and helpers of them the OS has is said once,
in the features' [debian] tables, and holds for both engines. What is named there by Debian's paths
is translated to Buildroot's (no multiarch directories, site-packages, its own Python version).
"""

from __future__ import annotations

import fnmatch
import re
import stat
from dataclasses import replace
from pathlib import Path
from posixpath import basename, dirname

from hostos.build import bytecode, elf, load_order
from hostos.build import tree as trees
from hostos.build.engines.buildroot_config import EXTERNAL
from hostos.build.profile import Profile
from hostos.build.tree import Tree
from hostos.cpio import Entry
from hostos.errors import failure

PROGRAMS = ("usr/bin", "usr/sbin")
UNITS = "usr/lib/systemd/system"
HELPERS = "usr/lib/systemd"
# Of /etc only what programs look up; the rest is the overlay's.
KEEP_ETC = ("etc/protocols", "etc/services", "etc/ethertypes")
# Programs that are in /usr/sbin elsewhere.
ADMINISTRATION = ("agetty", "bridge", "halt", "ip", "losetup", "poweroff", "reboot", "shutdown", "sshd")
# D-Bus as Buildroot builds it runs as "dbus"; the overlay's accounts have Debian's name for it.
DBUS_CONFIG = "usr/share/dbus-1/system.conf"


def collect(tar: Path, profile: Profile, busybox_links: str) -> Tree:
    """The tree of Buildroot's `rootfs.tar`, trimmed to what the profile's features ask for.

    `busybox_links`: BusyBox's own list of its programs (busybox.links). Raises `UserError` (status
    1) when a feature wants a BusyBox program this BusyBox was not built with.
    """
    check_busybox(profile, busybox_links)
    patterns = [translate(each) for feature in profile.features for each in feature.debian.drop]
    dropped = _pattern([*left_out(), *patterns])
    programs = {name for feature in profile.features for names in feature.debian.keep.values() for name in names}
    programs |= {"busybox", "dash"}
    units = {unit for feature in profile.features for unit in feature.debian.units}
    helpers = {name for feature in profile.features for name in feature.debian.helpers}

    def wanted(path: str) -> bool:
        below = path
        while below:
            if dropped.match(below):
                return False
            below = dirname(below)
        parent, name = dirname(path), basename(path)
        if path.startswith("etc/"):
            return path in KEEP_ETC
        if parent in PROGRAMS:
            return name in programs or re.fullmatch(r"python3(\.\d+)?", name) is not None
        if parent == UNITS:
            return name in units or name.endswith((".d", ".wants"))
        if parent == HELPERS and name.startswith("systemd"):
            return name in helpers
        return dirname(parent) != UNITS

    tree = Tree()
    with tar.open("rb") as stream:
        for entry in trees.from_tar(stream, tar.name, wanted):
            tree.add(replace(entry, uid=0, gid=0))
    _tidy(tree)
    _place_loader(tree)
    _place_administration(tree)
    kept = [name for feature in profile.features for name in feature.debian.libraries]
    for path in elf.unneeded_libraries(tree, kept):
        del tree.entries[path]
    load_order.unify(tree)
    _remove_empty_directories(tree)
    return tree


def check_busybox(profile: Profile, links: str) -> None:
    """Raise `UserError` (status 1) when BusyBox lacks a program a feature asks for."""
    has = {basename(line.strip()) for line in links.splitlines()}
    asked = {name: feature for feature in profile.features for name in feature.busybox}
    if missing := sorted(name for name in asked if name not in has):
        raise failure(
            f"BusyBox was built without {', '.join(missing)}, which {asked[missing[0]].file} asks for",
            "switch it on in buildroot-external/board/hostos/busybox.fragment",
        )


def left_out() -> list[str]:
    """The patterns of `buildroot-external/board/hostos/left-out`."""
    lines = (EXTERNAL / "board/hostos/left-out").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def translate(pattern: str) -> str:
    """A path pattern of a feature's [debian] table as it is in Buildroot's tree."""
    pattern = pattern.replace("usr/lib/*-linux-gnu/", "usr/lib/").replace("/dist-packages", "/site-packages")
    if pattern.endswith(".py"):
        pattern += "*"  # Buildroot's packages bring byte code only
    return re.sub(r"/python3(?:\.\d+)?/", "/python3.[0-9][0-9]/", pattern)


def _pattern(patterns: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{fnmatch.translate(each)})" for each in patterns))


def _tidy(tree: Tree) -> None:
    for path, entry in list(tree.entries.items()):
        target = basename(entry.data.decode(errors="replace")) if stat.S_ISLNK(entry.mode) else ""
        dead = target and path.startswith(UNITS) and tree.resolve(path) not in tree
        # Links to BusyBox are made by the common code, from the features' lists.
        applet = target == "busybox" and dirname(path) in PROGRAMS
        if dead or applet or stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode):
            del tree.entries[path]
    if (config := tree.entries.get(DBUS_CONFIG)) is not None:
        tree.add(replace(config, data=config.data.replace(b"<user>dbus</user>", b"<user>messagebus</user>")))
    python = next((path for path in sorted(tree.entries) if re.fullmatch(r"usr/bin/python3\.\d+", path)), None)
    if python:
        tree.link("usr/bin/python3", basename(python))


def _place_loader(tree: Tree) -> None:
    """Programs name their dynamic linker by /lib64 on x86_64. Buildroot links that to /lib; in our
    tree, as in Debian's, it is a directory of its own."""
    entry = tree.entries.get("usr/lib64")
    if entry is not None and stat.S_ISLNK(entry.mode):
        del tree.entries["usr/lib64"]
    for path in [path for path in tree.entries if re.fullmatch(r"usr/lib/ld-linux-x86-64\.so\.\d+", path)]:
        tree.link(f"usr/lib64/{basename(path)}", f"../lib/{basename(path)}")


def _place_administration(tree: Tree) -> None:
    """With systemd, Buildroot merges /usr/sbin into /usr/bin. What is called by its full path (units,
    other hosts' scripts) is found in both places."""
    entry = tree.entries.get("usr/sbin")
    if entry is None or not stat.S_ISLNK(entry.mode):
        return
    del tree.entries["usr/sbin"]
    for name in ADMINISTRATION:
        if f"usr/bin/{name}" in tree:
            tree.link(f"usr/sbin/{name}", f"../bin/{name}")


def _remove_empty_directories(tree: Tree) -> None:
    used = set()
    for path, entry in tree.entries.items():
        if not stat.S_ISDIR(entry.mode):
            while path := dirname(path):
                used.add(path)

    def keep(path: str, entry: Entry) -> bool:
        return not stat.S_ISDIR(entry.mode) or path in used

    tree.filter(keep)


def compile_python(tree: Tree, interpreter: Path) -> None:
    """Replace every `.py` of `tree` by the byte code of Buildroot's own Python for the build machine,
    which is the guest's version. Raises `UserError` (status 1) when it is gone or a module is wrong."""
    if not interpreter.exists():
        raise failure(
            f"Buildroot's Python is gone ({interpreter})",
            "the same command again: it is made anew",
        )
    bytecode.compile_with([interpreter, "-I", "-S"], tree, {})
