"""Root tree + overlay -> the initrd: what every engine's tree goes through."""

from __future__ import annotations

import gzip
import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path

from hostos import __version__
from hostos.build import tree as trees
from hostos.build.profile import Profile
from hostos.build.tree import Tree
from hostos.cpio import Entry, write_newc

REPOSITORY = Path(__file__).resolve().parents[2]
OVERLAY = REPOSITORY / "overlay"
SENTINEL = "etc/hostos/complete"

# What is not 0644 or 0755. A git checkout keeps no other modes, so they stand here.
MODES = {
    "etc/shadow": 0o600,
    "root": 0o700,
    "root/.ssh": 0o700,
    "tmp": 0o1777,
    "var/tmp": 0o1777,
    "etc/hostos/instance": 0o700,
    "var/empty": 0o755,
}
DIRECTORIES = (
    "dev", "etc", "etc/hostos", "etc/hostos/instance", "mnt", "proc", "root", "root/.ssh",
    "run", "sys", "tmp",
    "usr/bin", "usr/sbin", "usr/lib", "usr/lib64",
    "var", "var/cache", "var/empty", "var/lib", "var/lib/machines", "var/log", "var/tmp",
)  # fmt: skip
LINKS = {
    "bin": "usr/bin",
    "sbin": "usr/sbin",
    "lib": "usr/lib",
    "lib64": "usr/lib64",
    "init": "usr/lib/systemd/systemd",
    "var/run": "../run",
    "var/lock": "../run/lock",
}
# Started by the overlay's own links, or not at all: what an engine enables must not make a difference.
DISABLED = (
    "usr/lib/systemd/system/*.wants",
    "usr/lib/systemd/system/sshd.service",
    "etc/initrd-release",
    "etc/init.d",
    "etc/fstab",
)


def complete(engine_tree: Tree, client: Iterable[Entry], profile: Profile) -> Tree:
    """The finished root tree: the engine's, plus links, overlay and, with the feature `live`, the
    live-boot client."""
    tree = Tree(dict(engine_tree.entries))
    tree.remove(*DISABLED)
    for directory in DIRECTORIES:
        tree.directory(directory)
    for path, target in LINKS.items():
        tree.link(path, target)
    if "usr/bin/dash" in tree:
        tree.link("usr/bin/sh", "dash")
    for name in (name for feature in profile.features for name in feature.busybox):
        if f"usr/bin/{name}" not in tree and f"usr/sbin/{name}" not in tree:
            tree.link(f"usr/bin/{name}", "busybox")
    for entry in trees.from_directory(OVERLAY):
        tree.add(entry)
    if any(feature.name == "live" for feature in profile.features):
        for entry in client:
            tree.add(entry)
    else:
        tree.remove("*/hostos-live.*", "*/hostos-container@.service")
    tree.file("usr/lib/os-release", os_release(profile))
    tree.link("etc/os-release", "../usr/lib/os-release")
    _fix(tree)
    return tree


def live_client() -> Iterable[Entry]:
    """The part of this package that runs in the guest, as sources below /usr/lib/hostos/python."""
    package = REPOSITORY / "hostos"
    files = [package / "__init__.py", package / "errors.py", *sorted((package / "live").rglob("*.py"))]
    for file in files:
        target = f"usr/lib/hostos/python/{file.relative_to(REPOSITORY).as_posix()}"
        yield Entry(target, stat.S_IFREG | 0o644, data=file.read_bytes())


def os_release(profile: Profile) -> str:
    """os-release(5)."""
    return (
        f'NAME="hostos"\nID=hostos\nVERSION_ID={__version__}\nPRETTY_NAME="hostos {__version__} ({profile.name})"\n'
        f"VARIANT_ID={profile.name}\n"
    )


def _fix(tree: Tree) -> None:
    for path, mode in MODES.items():
        if (entry := tree.entries.get(path)) is not None:
            tree.add(Entry(path, stat.S_IFMT(entry.mode) | mode, data=entry.data, nlink=entry.nlink))
    # The image belongs to root: package archives carry a few build-time owners that mean nothing here.
    for path, entry in list(tree.entries.items()):
        if entry.uid or entry.gid or entry.mtime:
            tree.entries[path] = Entry(path, entry.mode, data=entry.data, rdev=entry.rdev, nlink=entry.nlink)


def pack(tree: Tree, out: Path) -> int:
    """Write `tree` as a cpio archive, the sentinel last; returns the bytes it takes unpacked.

    Same tree, same bytes: sorted, no times, no owners but root.
    """
    entries = tree.sorted()
    content = hashlib.sha256()
    for entry in entries:
        content.update(entry.name + b"\0" + entry.data)
    entries.append(Entry(SENTINEL, stat.S_IFREG | 0o444, data=content.hexdigest().encode() + b"\n"))
    with out.open("wb") as file:
        write_newc(entries, file)
    page = 4096
    return sum(-(-len(entry.data) // page) * page for entry in entries if stat.S_ISREG(entry.mode))


def compress(cpio: Path, gz: Path) -> None:
    """`cpio` as a gzip file."""
    # No name and no time in the header: https://www.rfc-editor.org/rfc/rfc1952
    with cpio.open("rb") as source, gz.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as sink:
        while block := source.read(1 << 20):
            sink.write(block)
    # What is appended to an initrd must start at a multiple of four.
    with gz.open("ab") as file:
        file.write(bytes(-gz.stat().st_size % 4))
