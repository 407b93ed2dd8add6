"""A repository as it is now, as an image: its signed indexes, the packages that the cache has, and a list
of all others by hash.

    dists/SUITE/InRelease …     as the archive signed them, so that apt checks the snapshot as it checks the archive
    pool/…                      packages of the cache, at their places
    CONTENTS                    SHA-256, size and path of every file that the indexes name; a line each
    ORIGIN                      what it is a snapshot of (JSON)

The same indexes and packages give the same image hash: times are those of the Release.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from hostos.errors import UserError
from hostos.mirror.catalogue import Catalogue, Known
from hostos.mirror.signatures import Keys
from hostos.mirror.store import Store
from hostos.mirror.upstreams import Upstreams, describe

ORIGIN = "ORIGIN"
APT_OPTIONS = "check-valid-until=no target=Packages"
"""Of a line in sources.list: a snapshot stays as it is, whatever the archive has meanwhile; translations and what
else its Release lists may not be in it."""


@dataclass(frozen=True)
class Origin:
    """`kind`: `apt` or `pacman`; `url` of an apt archive; `repository`: pacman's name of it."""

    kind: str
    url: str = ""
    repository: str = ""


@dataclass(frozen=True)
class Snapshot:
    """`named`: files that the indexes name; `packages`: those of them that are in it; `date`: Unix time of
    its newest index."""

    tree: Path
    named: int
    packages: int
    date: float


def find(repository: str, upstreams: Upstreams) -> tuple[str, Origin]:
    """Where a repository given by URL, by `host/path` or (pacman) by name stands in the catalogue, and what it is.

    Raises UserError for one that is not cached, or is several.
    """
    wanted = repository.partition("://")[2] or repository
    bases = dict.fromkeys([*(each.base for each in upstreams.apt), *(each.base for each in upstreams.pacman)])
    names = {each.base for each in upstreams.pacman if each.repository == repository}
    found = [base for base in bases if base == wanted.rstrip("/") or base in names]
    if len(found) != 1:
        lines = "\n    ".join(describe(upstreams)) or "none: hostos mirror import"
        raise UserError(f"{repository!r} is none of the cached repositories:\n    {lines}", "give its URL")
    apt = [each.url for each in upstreams.apt if each.base == found[0]]
    return found[0], Origin("apt", apt[0]) if apt else Origin("pacman", repository=found[0].split("/")[1])


@contextmanager
def made(base: str, origin: Origin, catalogue: Catalogue, store: Store) -> Iterator[Snapshot]:
    """The snapshot's tree, in a directory that is removed afterwards. Raises UserError if nothing that is
    signed is known of the repository."""
    with tempfile.TemporaryDirectory(prefix="snapshot-", dir=store.partials.parent) as name:
        tree = Path(name) / "tree"
        tree.mkdir()
        date = _pacman(base, tree, store) if base.startswith("pacman/") else _releases(base, tree, catalogue, store)
        if date is None:
            raise UserError(
                f"nothing is known of {base} yet", "have a client use it first: apt-get update, or pacman -Sy"
            )
        (tree / ORIGIN).write_text(json.dumps(asdict(origin)) + "\n")
        named = packages = 0
        with (tree / "CONTENTS").open("w") as listing:
            for known in catalogue.below(base):
                path = known.location[len(base) + 1 :]
                listing.write(f"{known.sha256} {known.size} {path}\n")
                named += 1
                packages += _copy(known, tree / path, store)
                signature = store.root / "pacman/signatures" / known.sha256
                if base.startswith("pacman/") and signature.exists():
                    shutil.copyfile(signature, tree / f"{path}.sig")
        for directory, _, files in os.walk(tree, topdown=False):
            for file in files:
                (Path(directory) / file).chmod(0o644)
                os.utime(Path(directory) / file, (date, date))
            Path(directory).chmod(0o755)
            os.utime(directory, (date, date))
        yield Snapshot(tree, named, packages, date)


def _releases(base: str, tree: Path, catalogue: Catalogue, store: Store) -> float | None:
    newest = None
    for root in catalogue.roots(base):
        stored = catalogue.release(root)
        assert stored
        directory = tree / root[len(base) + 1 :]
        directory.mkdir(parents=True, exist_ok=True)
        forms = {"InRelease": stored.inline, "Release": b"" if stored.inline else stored.text}
        for form, data in {**forms, "Release.gpg": stored.signature}.items():
            if data:
                (directory / form).write_bytes(data)
        for path in catalogue.listed_below(root):
            if (known := catalogue.listed(root, path)) is not None:
                _copy(known, directory / path, store)
        newest = max(newest or 0.0, stored.date)
    return newest


def _pacman(base: str, tree: Path, store: Store) -> float | None:
    _, repository, architecture = base.split("/")
    found = None
    for name in (f"{repository}.db", f"{repository}.db.sig"):
        file = store.root / "pacman/databases" / f"{repository}-{architecture}-{name}"
        if file.exists():
            shutil.copyfile(file, tree / name)
            found = max(found or 0.0, float(int(file.stat().st_mtime)))
    return found


def _copy(known: Known, target: Path, store: Store) -> bool:
    if store.size(known.sha256) != known.size:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(store.path(known.sha256), target)
    return True


PLACE = "srv/snapshot"
"""Where an image has the snapshot that is its package source."""
KEYRING = "etc/apt/keyrings/snapshot.gpg"


def as_source(snapshot: Snapshot, origin: Origin, keys: Keys) -> Path:
    """A tree to lay over a system's, which makes the snapshot its package source instead of /etc/apt/sources.list
    or pacman's mirrors. Moves the snapshot's tree. `keys`: by which apt is to check it; none: those it trusts."""
    top = snapshot.tree.parent / "source"
    place = top / PLACE
    place.parent.mkdir(parents=True)
    snapshot.tree.rename(place)
    if origin.kind == "apt":
        rings = top.with_name("rings")
        rings.mkdir()
        blob = b"".join(Path(ring).read_bytes() for ring in keys.rings(rings)) if keys != Keys() else b""
        if blob:
            _put(top / KEYRING, blob)
        signed = f" signed-by=/{KEYRING}" if blob else ""
        lines = [f"deb [{APT_OPTIONS}{signed}] file:/{PLACE} {each}\n" for each in _suites(place)]
        _put(top / "etc/apt/sources.list", "".join(lines).encode())
    else:
        _put(top / "etc/pacman.d/mirrorlist", f"Server = file:///{PLACE}\n".encode())
    for directory, _, files in os.walk(top, topdown=False):
        if not Path(directory).is_relative_to(place):
            for each in (*(Path(directory) / file for file in files), Path(directory)):
                os.utime(each, (snapshot.date, snapshot.date))
    return top


def _suites(place: Path) -> list[str]:
    """Each with the components it has an index of, as in sources.list."""
    found = []
    roots = sorted({path.parent for path in place.rglob("*Release") if path.name in ("InRelease", "Release")})
    for root in roots:
        indexes = [path for path in root.rglob("Packages*") if path.parent.name.startswith("binary-")]
        components = sorted({str(path.parent.parent.relative_to(root)) for path in indexes})
        if root == place:
            found.append("./")
        elif components:
            found.append(f"{root.relative_to(place / 'dists')} {' '.join(components)}")
    return found


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o644)
