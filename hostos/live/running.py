"""One container: what it is, the files it is started from, and its process from start to end.

It runs as long as its systemd-nspawn does, which is told by a FIFO when it starts, and watched
through a process descriptor from then on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from hostos.errors import UserError, failure
from hostos.live.container import Options, nspawn_argv, run_script
from hostos.live.ipfs_image import IpfsImage
from hostos.live.mounts import MountedLayer
from hostos.live.processes import HALT, Process, leader
from hostos.live.published import Port
from hostos.live.torrents import ImageBundle

START_LIMIT = 60.0
"""Seconds in which whoever asked for a container must have started it."""
LEADER_LIMIT = 20.0
"""Seconds to wait for its first process."""
KILL_LIMIT = 5.0
"""Seconds nspawn has to end by itself after its container was killed."""


INITS = ("usr/lib/systemd/systemd", "lib/systemd/systemd", "usr/sbin/init", "sbin/init")
"""Where systemd-nspawn looks for an init."""
SYSTEMD = INITS[:2]
"""Which of these are systemd."""
LINKER_CACHE = "etc/ld.so.cache"
NO_UPDATE = "systemd.condition_needs_update=0"
"""For systemd as an init (kernel-command-line(7); in a container those are its arguments). It takes an /etc without a
note that it is up to date (`.updated`) for older than /usr, and runs ldconfig, which reads all libraries, and more: at
each boot, if changes are not kept. Where there is a linker's cache already, a package manager has done all that."""
GETENT = ("usr/bin/getent", "bin/getent")
"""What systemd-nspawn runs in the image to find out about a user."""


@dataclass
class Container:
    """One container. `base`: first user of its range; `place`: its mounts; `state`: its files.

    `stack` undoes its mounts. `plans`: what is still to be fetched for it ahead, as `layers`; `milestones`:
    when (`time.monotonic()`, as `began`) it reached what. `supervisor`: its systemd-nspawn, once it was
    `started`; `given_up`: it shall not be waited for any longer; `ended`: nothing of it is left.
    """

    options: Options
    bundle: ImageBundle | IpfsImage
    base: int | None
    place: Path
    state: Path
    created: float
    root: Path = Path()
    changes: Path = Path()
    """The upper directory of its root."""
    layers: list[MountedLayer] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    plans: list[deque[int]] = field(default_factory=list)
    milestones: dict[str, float] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)
    supervisor: Process | None = None
    started: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    network: int | None = None
    published: list[Port] = field(default_factory=list)
    """What is listened on for it, until `listening` is cancelled."""
    lost: str = ""
    """Why it was stopped, if it was because nobody had what it reads."""
    listening: list[trio.CancelScope] = field(default_factory=list)
    given_up: trio.Event = field(default_factory=trio.Event)
    offered: str = ""
    """The image whose metadata others may have from this machine because of it."""
    only_mounted: bool = False
    is_system: bool = False
    """Whether it is the machine's own root (`hostos.live.root`)."""
    fifo: int = -1

    # --- its files --------------------------------------------------------------------------------

    @property
    def script(self) -> Path:
        return self.state / "run"

    @property
    def network_file(self) -> Path:
        """Its network's namespace (`--network nat`)."""
        return self.place.with_name(f".{self.options.name}.network")

    @property
    def announce(self) -> Path:
        return self.state / "started"

    @property
    def log(self) -> Path:
        return self.state.parent / f"{self.options.name}.log"

    def write_state(self) -> None:
        """Write what it is started from. Raises UserError if the image lacks what starting it takes."""
        image = self.bundle.manifest
        if self.options.init and not _has(self.root, INITS):
            raise UserError(
                f"image {image.name} has no init to boot",
                "give a command: hostos container boot … -- COMMAND",
            )
        user = image.boot.user.partition(":")[0]
        if not self.options.init and user not in ("", "root", "0") and not _has(self.root, GETENT):
            raise UserError(
                f"image {image.name} wants to run as {user!r}, and has no getent to say who that is",
                "publish it without --user, or with /usr/bin/getent in it (Debian: libc-bin)",
            )
        shutil.rmtree(self.state, ignore_errors=True)
        self.state.mkdir(parents=True)
        self.state.chmod(0o700)
        network = str(self.network_file)
        done = _has(self.root, SYSTEMD) and _has(self.root, (LINKER_CACHE,)) and not self.options.persist
        argv = nspawn_argv(self.options, image.boot, str(self.root), self.base, network, [NO_UPDATE] if done else [])
        self.script.write_text(run_script(argv, str(self.announce)))
        os.mkfifo(self.announce, 0o600)
        # Opened before anybody can start it, or what is written would be gone with its writer. For
        # writing too, or it would be readable for ever once the first writer is gone.
        self.fifo = os.open(self.announce, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.stack.callback(os.close, self.fifo)
        record = {"schema": 1, **self.describe(), "argv": argv, "created": self.created}
        (self.state / "state.json").write_text(json.dumps(record, indent=1) + "\n")

    # --- its process ------------------------------------------------------------------------------

    async def wait_for_start(self) -> bool:
        """Whether it started: not if it was given up, took longer than `START_LIMIT`, or ended at once."""
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                with trio.move_on_after(START_LIMIT):
                    await self.given_up.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            await trio.lowlevel.wait_readable(self.fifo)
            number = int(os.read(self.fifo, 64))
            with suppress(ProcessLookupError):  # it ended at once
                self.supervisor = Process(number)
                self.milestones["started"] = time.monotonic()
                self.started.set()
            nursery.cancel_scope.cancel()
        return self.supervisor is not None

    async def leader(self) -> int:
        """Its first process. Raises UserError if it does not run."""
        with trio.move_on_after(LEADER_LIMIT):
            while self.supervisor and not self.ended.is_set():
                if number := leader(self.supervisor.number):
                    return number
                await trio.sleep(0.02)
        raise failure(f"container {self.options.name} is not running", "hostos container ls")

    async def halt(self, deadline: float) -> bool:
        """Ask its first process to shut down; whether it ended within `deadline` seconds."""
        gently = False
        with suppress(UserError, ProcessLookupError), trio.move_on_after(max(deadline, 0.0)):
            first = Process(await self.leader())
            try:
                while not self.ended.is_set():
                    # Repeated: a PID 1 that has only just begun ignores it.
                    first.send(HALT)
                    with trio.move_on_after(0.5):
                        await self.ended.wait()
                gently = True
            finally:
                first.close()
        return gently

    async def kill(self) -> None:
        """SIGKILL for its first process takes all others with it, then for nspawn itself."""
        if self.supervisor is None:
            return
        with suppress(ProcessLookupError):
            if number := leader(self.supervisor.number):
                first = Process(number)
                first.send(signal.SIGKILL)
                first.close()
        with trio.move_on_after(KILL_LIMIT):
            await self.supervisor.ended()
            return
        self.supervisor.send(signal.SIGKILL)

    def errors(self) -> list[str]:
        """Why reads of it have failed, as far as that is known."""
        return [stats.last_error for layer in self.layers if (stats := layer.source.stats()).errors]

    # --- telling ----------------------------------------------------------------------------------

    def fetched(self) -> int:
        """Bytes received since it was made (a layer another container uses too is counted whole)."""
        return sum(layer.source.stats().downloaded - self.before[layer.torrent.info_hash] for layer in self.layers)

    def describe(self) -> dict[str, Any]:
        name = "mounted" if self.only_mounted else "running" if self.supervisor else "starting"
        return {
            "name": self.options.name,
            "image": self.bundle.image,
            "image_name": self.bundle.manifest.name,
            "state": "ended" if self.ended.is_set() else name,
            "init": self.options.init,
            "command": list(self.options.command or self.bundle.manifest.boot.command),
            "seconds": round(time.time() - self.created, 1),
            "fetched": self.fetched(),
            "size": self.bundle.manifest.size,
            "root": str(self.root),
            "supervisor": self.supervisor.number if self.supervisor else None,
            "users": self.base,
            "lost": self.lost,
            "published": {str(port.inside): port.listen for port in self.published},
        }

    def stats(self) -> dict[str, Any]:
        layers = []
        for layer in self.layers:
            figures = layer.source.stats().as_dict()
            layers.append({"layer": layer.torrent.info_hash, **figures, "from": layer.source.peers()})
        return {**self.describe(), "layers": layers}

    def timeline(self) -> dict[str, Any]:
        """Which pieces came and were first read, after how many seconds, why, and the milestones."""
        milestones = {name: round(when - self.began, 4) for name, when in self.milestones.items()}
        layers = [
            {"layer": layer.torrent.info_hash, "piece_size": layer.torrent.piece_size,
             **layer.source.journal.describe(self.began)}
            for layer in self.layers
        ]  # fmt: skip
        return {
            "name": self.options.name,
            "image_name": self.bundle.manifest.name,
            "seconds": round(time.monotonic() - self.began, 4),
            "milestones": milestones,
            "layers": layers,
        }

    def reads(self) -> list[tuple[int, int, int]]:
        """Of a traced container: what was read for the first time (layer, offset, length), in order."""
        noted = [
            (when, number, offset, length)
            for number, layer in enumerate(self.layers)
            for when, offset, length in layer.source.journal.reads
        ]
        return [(number, offset, length) for _, number, offset, length in sorted(noted)]


def _has(root: Path, places: tuple[str, ...]) -> bool:
    """Whether one of these is there. Only names are looked at: a link may lead anywhere."""
    return any(os.path.lexists(root / place) for place in places)
