"""What publishing, seeding and the native lazy mount need (`hostos doctor`)."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hostos.errors import UserError
from hostos.findings import Finding, ok, warning
from hostos.hostsystem import install

FUSE = Path("/dev/fuse")


def findings() -> Iterator[Finding]:
    yield from check_packing()
    yield from check_building()
    yield from check_libtorrent()
    yield from check_seed()
    yield from check_native()


def check_packing() -> Iterator[Finding]:
    missing = {"tar2sqfs": "squashfs-tools-ng", "unsquashfs": "squashfs-tools"}
    missing = {tool: package for tool, package in missing.items() if not shutil.which(tool)}
    if missing:
        says = f"{', '.join(missing)} not found: no hostos image publish (booting images works)"
        yield warning("packing", says, install(*missing.values()))
    else:
        yield ok("packing", "tar2sqfs and unsquashfs are there")


def check_building() -> Iterator[Finding]:
    """Whether recipes can be built: a sandbox is set up and torn down."""
    from hostos.image import sandbox

    try:
        sandbox.inside_works()
        sandbox.scratch()
    except UserError as error:
        yield warning("image builds", f"{error.message}: no hostos image build", error.hint)
    else:
        yield ok("image builds", "steps can run in a user namespace")


def check_libtorrent() -> Iterator[Finding]:
    try:
        import libtorrent
    except ImportError as error:
        yield warning("libtorrent", f"{error}: no seed, no publishing", "pip install libtorrent")
        return
    version = tuple(int(part) for part in libtorrent.__version__.split(".")[:2])
    if version < (2, 0):
        yield warning("libtorrent", f"{libtorrent.__version__} knows no BitTorrent v2", "pip install 'libtorrent>=2'")
    else:
        yield ok("libtorrent", libtorrent.__version__)


def check_seed() -> Iterator[Finding]:
    from hostos.image import seeding

    try:
        info = seeding.status()
    except (UserError, OSError) as error:
        hint = error.hint if isinstance(error, UserError) else ""
        yield warning("seed", str(error).splitlines()[0], hint or "hostos seed stop, then hostos seed start")
        return
    if info is None:
        yield ok("seed", "not running; it starts when it is needed")
        return
    bad = [torrent for torrent in info.details["torrents"] if torrent["error"]]
    if bad:
        first = f"{bad[0]['hash'][:16]}: {bad[0]['error']}"
        yield warning("seed", f"{len(bad)} images cannot be offered, e.g. {first}", "hostos image verify")
    else:
        yield ok("seed", f"running on {info.address}, {len(info.details['torrents'])} torrents")


def check_native() -> Iterator[Finding]:
    """The lazy mount without a guest: for tests, benchmarks and people who want no machine."""
    lacks = [name for name in ("pyfuse3", "trio") if importlib.util.find_spec(name) is None]
    if not os.access(FUSE, os.R_OK | os.W_OK):
        lacks.append(f"access to {FUSE}")
    if not shutil.which("fusermount3"):
        lacks.append("fusermount3")
    if lacks:
        fix = "apt-get install fuse3 libfuse3-dev; pip install 'hostos[native]'"
        yield warning("native mounts", f"not without a machine: {', '.join(lacks)} missing", fix)
    else:
        yield ok("native mounts", "FUSE, pyfuse3 and trio are there")
