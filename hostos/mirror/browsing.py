"""Looking into a snapshot, and serving it over HTTP: to a browser, a package manager, an installer."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from hostos.errors import UserError, failure
from hostos.hostsystem import install


@dataclass(frozen=True)
class Entry:
    """A file that the snapshot's indexes name. `held`: it is in the snapshot, too."""

    path: str
    size: int
    sha256: str
    held: bool


def listing(layer: Path) -> list[Entry]:
    """What the snapshot in the squashfs file `layer` names. Raises UserError for one that is no snapshot."""
    held = set(_unsquashfs("-d", "", "-l", str(layer)).decode(errors="replace").splitlines())
    if not {"/CONTENTS", "/ORIGIN"} <= held:
        raise UserError("this image is no snapshot of a repository", "hostos mirror publish makes one")
    rows = (line.split(" ", 2) for line in _unsquashfs("-cat", str(layer), "CONTENTS").decode().splitlines())
    return [Entry(path, int(size), sha256, f"/{path}" in held) for sha256, size, path in rows]


def unpack(layer: Path, target: Path) -> None:
    """Raises UserError."""
    _unsquashfs("-quiet", "-no-progress", "-no-xattrs", "-dest", str(target), str(layer))


def _unsquashfs(*words: str) -> bytes:
    if not shutil.which("unsquashfs"):
        raise UserError("unsquashfs is needed to read a snapshot", install("squashfs-tools"))
    done = subprocess.run(["unsquashfs", *words], capture_output=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise failure(f"unsquashfs failed: {said[-1] if said else done.returncode}", "is the disk full?")
    return done.stdout


def serve(tree: Path, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve `tree`, with lists of its directories, until SIGINT or SIGTERM; `ready` hears the URL. Raises UserError."""
    asyncio.run(_serve(tree, host, port, ready))


async def _serve(tree: Path, host: str, port: int, ready: Callable[[str], None]) -> None:
    application = web.Application()
    application.router.add_static("/", tree, show_index=True)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    try:
        try:
            await web.TCPSite(runner, host, port, shutdown_timeout=1).start()
        except OSError as error:
            raise UserError(
                f"can't listen on {host}:{port}: {error.strerror}", "give another --listen ADDRESS:PORT"
            ) from None
        address = runner.addresses[0]
        ready(f"http://{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}")
        await stopping.wait()
    finally:
        await runner.cleanup()
