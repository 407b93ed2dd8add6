"""One build step: run in the sandbox over what is below, or copied; what it changed becomes a layer."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from hostos.errors import UserError
from hostos.image import overlay, package_cache, sandbox, unpacked
from hostos.image.base import environment, logged
from hostos.image.buildcache import Package, Packages
from hostos.image.entries import Entry, arrange
from hostos.image.layers import read_layer
from hostos.image.overlay import Tree
from hostos.image.pacman_database import timeless
from hostos.image.recipe import Recipe, Step
from hostos.image.sandbox import Ids
from hostos.image.sources import read_directory
from hostos.live.torrents import Torrent
from hostos.steps import Steps

if TYPE_CHECKING:
    from hostos.image.pins import Pins

# What package managers leave that differs from run to run, and is made anew when it is needed.
_TRACES = (
    b"var/lib/apt/lists/", b"var/cache/apt/", b"var/log/apt/", b"var/log/dpkg.log", b"var/log/alternatives.log",
    b"var/cache/ldconfig/aux-cache", b"var/cache/debconf/", b"var/log/bootstrap.log", b"var/log/pacman.log",
    b"var/lib/pacman/sync/", b"var/cache/pacman/pkg/", b"root/.bash_history", b"root/.lesshst",
)  # fmt: skip
_MOUNTED = (b"dev", b"proc", b"run", b"sys", b"tmp")
_NODES = ("null", "zero", "full", "random", "urandom", "tty")


Script = str | Callable[[Packages], str]
"""Of a shell; or what makes one of the packages that were found."""


@dataclass
class Place:
    """What a step runs on: layers, lowest first (they grow), and the settings the steps before it made.

    `stack`: as long as it is open, the trees' contents can be read.
    """

    layers: list[tuple[Torrent, Path]]
    stack: ExitStack
    epoch: int
    who: Ids
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = ""
    pins: Pins | None = None
    """Where packages come from, instead of from where the image says."""

    _tree: Tree = field(default_factory=lambda: overlay.merge([]))
    _read: int = 0

    def tree(self) -> Tree:
        """What the layers make together; each is read once."""
        while self._read < len(self.layers):
            entries = read_layer(self.layers[self._read][1], self.stack)
            self._tree = overlay.on_top(self._tree, entries, self._read)
            self._read += 1
        return self._tree


def copied(recipe: Recipe, step: Step) -> list[tuple[Path, list[Entry]]]:
    """What a `copy` takes: each source and its entries, owners, times and modes as they will be (but not the epoch).

    Raises UserError if a source is missing.
    """
    found = []
    uid, gid = map(int, step.owner.split(":"))
    for value in step.value:
        source = recipe.file.parent / value
        if not source.exists() and not source.is_symlink():
            raise UserError(f"{recipe.file}:{step.line}: there is no {source} to copy", "paths are from the recipe on")
        entries = read_directory(source, Steps()) if source.is_dir() else [_one(source)]
        found.append((source, [_settled(entry, uid, gid, step.mode) for entry in entries]))
    return found


def _one(source: Path) -> Entry:
    """A single file as an entry called `b""`."""
    status = source.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{source} is neither a file nor a directory")
    segments = ((0, status.st_size),) if status.st_size else ()
    return Entry(b"", status.st_mode, size=status.st_size, segments=segments, open=lambda: source.open("rb"))


def _settled(entry: Entry, uid: int, gid: int, mode: int | None) -> Entry:
    """Free of what differs between two check-outs of the same files: umask, owner, times."""
    if stat.S_ISLNK(entry.mode):
        bits = 0o777
    elif stat.S_ISDIR(entry.mode):
        bits = 0o755
    else:
        bits = mode if mode is not None else 0o755 if entry.mode & 0o111 else 0o644
    return replace(entry, mode=stat.S_IFMT(entry.mode) | bits, uid=uid, gid=gid, mtime=0, xattrs=())


def digest(sources: Iterable[tuple[Path, list[Entry]]]) -> str:
    """Of names, modes and contents."""
    total = sha256()
    for source, entries in sources:
        for entry in entries:
            row = (source.name, entry.path, entry.mode, entry.uid, entry.gid, entry.target, entry.link)
            total.update(repr(row).encode())
            if entry.is_file and entry.open:
                with entry.open() as file:
                    while data := file.read(1 << 20):
                        total.update(data)
    return total.hexdigest()


def copy(recipe: Recipe, step: Step, place: Place) -> list[Entry]:
    """The layer of a `copy`, arranged."""
    below = place.tree()
    into = step.to.endswith("/")
    sources = copied(recipe, step)
    if len(sources) > 1 and not into:
        raise UserError(f"{recipe.file}:{step.line}: several sources go into a directory", f'write to = "{step.to}/"')
    result = []
    for source, entries in sources:
        single = not stat.S_ISDIR(entries[0].mode)
        target = step.to + (source.name if into and (single or len(sources) > 1) else "")
        prefix = real_path(below, os.fsencode(target.strip("/")))
        for entry in entries:
            path = b"/".join(part for part in (prefix, entry.path) if part)
            node = below.root.find(path)
            if stat.S_ISDIR(entry.mode) and node is not None and node.is_directory:
                entry = replace(node.entry, path=path)  # one that is there stays as it is
            link = b"/".join((prefix, entry.link)) if entry.link is not None else None
            result.append(replace(entry, path=path, link=link, mtime=entry.mtime or place.epoch))
    return overlay.complete(result, below, f"{recipe.file}:{step.line}")


def real_path(tree: Tree, path: bytes) -> bytes:
    """`path` with the symbolic links on the way to it followed, inside the tree. Raises UserError: a loop."""
    done: list[bytes] = []
    left = path.split(b"/")[::-1]
    for _ in range(255):
        while left:
            part = left.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                done = done[:-1]
                continue
            node = tree.root.find(b"/".join([*done, part]))
            if left and node is not None and stat.S_ISLNK(node.entry.mode):
                if node.entry.target.startswith(b"/"):
                    done = []
                left += node.entry.target.split(b"/")[::-1]
                break
            done.append(part)
        else:
            return b"/".join(done)
    raise UserError(f"/{path.decode(errors='replace')}: symbolic links go in a circle in the image")


# --- in the sandbox ---------------------------------------------------------------------------------


def run(step: Step, place: Place, stack: ExitStack, steps: Steps, what: str) -> list[Entry]:
    """Run the step's commands as one shell script; the layer, arranged, or nothing if it changed nothing."""
    script = "\n".join(step.value)
    return _changed([("", script)], place, step.network, stack, steps, what)[0]


def install(
    step: Step, place: Place, locked: Packages | None, stack: ExitStack, steps: Steps, what: str
) -> tuple[list[Entry], Packages]:
    """Install packages with the image's own package manager; the layer and what was installed.

    `locked`: exactly those, of these versions and hashes. Raises UserError if the mirror has others.
    """
    root = place.tree().root
    exact = [f"{name}={package.version}" for name, package in sorted((locked or {}).items())]
    words = shlex.join(exact or step.value)
    parts: list[tuple[str, Script]]
    if root.find(b"usr/bin/apt-get"):
        apt = "apt-get -q -y -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0 --no-install-recommends"
        more = place.pins.step_options if place.pins else package_cache.for_apt(place.tree())
        apt = shlex.join([*apt.split(), *more])
        parts = [
            # Without ForceHash it tells MD5.
            ("", f"{apt} update\n{apt} -o Acquire::ForceHash=SHA256 install --print-uris {words} > /run/hostos/uris"),
            ("uris", lambda found: _apt_script(apt, step.value, found)),
        ]
    elif root.find(b"usr/bin/pacman"):
        pacman = shlex.join(
            ["pacman", "--noconfirm", "--noprogressbar", *(place.pins.step_options if place.pins else ())]
        )
        names = shlex.join(step.value)
        parts = [
            ("", f"{pacman} -Sy --print --print-format '%l %n_%v_x %s' {names} > /run/hostos/uris"),
            ("uris", f"{pacman} -S {names}\nrm -rf /var/cache/pacman/pkg/*"),
        ]
    else:
        raise UserError(f"{what}: the image has neither apt-get nor pacman", "install them in a `run` step")
    return _changed(parts, place, step.network and not place.pins, stack, steps, what, locked)


def _apt_script(apt: str, names: Sequence[str], found: Packages) -> str:
    """Install exactly what was found, and mark as wanted only what was asked for: the same, locked or not."""
    exact = shlex.join(f"{name}={package.version}" for name, package in sorted(found.items()))
    asked = {name.partition("=")[0].partition(":")[0] for name in names}
    brought = shlex.join(sorted(found.keys() - asked))
    mark = f"apt-mark auto {brought} > /dev/null\n" if brought else ""
    return f"{apt} install {exact}\n{mark}{apt} clean" if exact else f"{apt} install {shlex.join(names)}"


def _changed(
    parts: Sequence[tuple[str, Script]],
    place: Place,
    network: bool,
    stack: ExitStack,
    steps: Steps,
    what: str,
    locked: Packages | None = None,
) -> tuple[list[Entry], Packages]:
    """Run scripts one after the other over the same upper directory; what is in that, and packages told of."""
    who, scratch = place.who, sandbox.scratch()
    lowers = [unpacked.unpacked(torrent, path, who, steps) for torrent, path in place.layers]
    here = sandbox.own(scratch / f"w{os.getpid()}", who)
    stack.callback(unpacked.remove, here, who)
    for name in ("upper", "work", "root", "told", "empty"):
        sandbox.own(here / name, who)
    made, top = _missing(place.tree()), place.tree().root.entry
    packages: Packages = {}
    if place.pins:
        place.pins.tell(here / "told")
    for told, given in parts:
        if told:
            packages = _uris(here / "told" / told)
            check_lock(packages, locked, what)
        script = given if isinstance(given, str) else given(packages)

        def work(script: str = script) -> int:
            os.chown(here / "upper", top.uid, top.gid)
            (here / "upper").chmod(stat.S_IMODE(top.mode))
            names = [str(lower.relative_to(scratch)) for lower in lowers] or [f"{here.name}/empty"]
            sandbox.overlay(scratch, names, f"{here.name}/upper", f"{here.name}/work", here / "root")
            _furnish(here / "root", here / "told", network)
            if place.pins:
                place.pins.mount(here / "root")
            sandbox.pivot(here / "root")
            env = environment(place.epoch) | place.env
            # A package manager is root, whoever runs the steps after it.
            user = place.user if locked is None and len(parts) == 1 else ""
            shell = ["/bin/sh", "-e", "-c", script]
            return sandbox.execute(shell, env=env, cwd=place.workdir or "/", user=user)

        logged(work, place.log, who, network=network, what=what)
    entries = unpacked.read_upper(here / "upper", who, stack)
    kept = [
        replace(entry, mtime=min(entry.mtime, place.epoch))
        for entry in timeless(entries, place.epoch)
        if entry.path not in made and not _forgotten(entry)
    ]
    if all(entry.path == b"" for entry in kept):
        return [], packages
    return arrange(kept, what), packages


def _forgotten(entry: Entry) -> bool:
    if stat.S_ISDIR(entry.mode):
        return False
    return any(entry.path.startswith(trace) if trace.endswith(b"/") else entry.path == trace for trace in _TRACES)


def _missing(tree: Tree) -> set[bytes]:
    """What is made only to mount something on it."""
    wanted = (*_MOUNTED, b"etc/resolv.conf")
    return {path for path in wanted if tree.root.find(path) is None}


def _furnish(root: Path, told: Path, network: bool) -> None:
    """The file systems a command expects; what it writes there is not in the layer."""
    for name in ("dev", "proc", "run", "sys", "tmp"):
        (root / name).mkdir(exist_ok=True)
    sandbox.mount("proc", str(root / "proc"), "proc", sandbox.MS_NOSUID | sandbox.MS_NODEV | sandbox.MS_NOEXEC)
    for name, mode in (("dev", "0755"), ("run", "0755"), ("tmp", "1777")):
        sandbox.mount(name, str(root / name), "tmpfs", sandbox.MS_NOSUID | sandbox.MS_NODEV, f"mode={mode}")
    for name in _NODES:
        (root / "dev" / name).touch()
        sandbox.mount(f"/dev/{name}", str(root / "dev" / name), None, sandbox.MS_BIND)
    for name in ("pts", "shm"):
        (root / "dev" / name).mkdir()
    sandbox.mount("shm", str(root / "dev/shm"), "tmpfs", sandbox.MS_NOSUID | sandbox.MS_NODEV, "mode=1777")
    options = "newinstance,ptmxmode=0666,mode=620"
    sandbox.mount("devpts", str(root / "dev/pts"), "devpts", sandbox.MS_NOSUID | sandbox.MS_NOEXEC, options)
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        (root / "dev" / name).symlink_to(f"/proc/self/fd{target}")
    (root / "run/hostos").mkdir()
    sandbox.mount(str(told), str(root / "run/hostos"), None, sandbox.MS_BIND)
    if network:
        _resolver(root)


def _resolver(root: Path) -> None:
    """The host's name servers, for as long as the step runs."""
    try:
        text = Path("/etc/resolv.conf").read_text()
    except OSError:
        return
    here = root / "etc/resolv.conf"
    here.parent.mkdir(exist_ok=True)
    if here.is_symlink():
        target = str(here.readlink())
        if target.lstrip("./").startswith("run/"):
            file = root / target.lstrip("./")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return
    here.touch()
    (root / "run/resolv.conf").write_text(text)
    sandbox.mount(str(root / "run/resolv.conf"), str(here), None, sandbox.MS_BIND)


def _uris(path: Path) -> Packages:
    """`'URI' name_version_arch.deb SIZE SHA256:…`, as apt-get prints them."""
    found: Packages = {}
    for line in path.read_text(errors="replace").splitlines():
        words = line.split()
        if len(words) >= 3 and words[1].count("_") >= 2:
            name, version, *_ = words[1].split("_")
            hash = next((word.partition(":")[2] for word in words[3:] if word.lower().startswith("sha256:")), "")
            found[name] = Package(unquote(version), hash)
    return found


def check_lock(packages: Packages, locked: Packages | None, what: str) -> None:
    if locked is None or packages == locked:
        return
    for name in sorted(packages.keys() | locked.keys()):
        now, then = packages.get(name), locked.get(name)
        if now != then:
            shown = [f"{each.version} {each.sha256[:12]}".strip() if each else "none" for each in (then, now)]
            raise UserError(
                f"{what}: package {name} is locked as {shown[0]}, the mirror has {shown[1]}",
                "take what it has now: --update; or build from a snapshot (hostos mirror publish)",
            )
