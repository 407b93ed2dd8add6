"""The containers of this machine: made, started, ended, and found by name.

Whether one runs is never stored (see `running`). However it ends, its mounts are undone here.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from hostos.errors import UserError, failure
from hostos.live import container as make
from hostos.live import network, published
from hostos.live.container import Options
from hostos.live.image import Images, resolve
from hostos.live.ipfs_image import IpfsImage, IpfsTree
from hostos.live.kept import Kept, Store
from hostos.live.leftovers import end_leftovers, forget
from hostos.live.manifest import Manifest
from hostos.live.mounts import Layers, check_binds, in_thread, mount_root
from hostos.live.private import layer_key
from hostos.live.protocol import event
from hostos.live.running import START_LIMIT, Container
from hostos.live.schedule import Rest
from hostos.live.torrents import ImageBundle, parse_web_seed
from hostos.live.trace import pieces

__all__ = ["START_LIMIT", "STOP_LIMIT", "Container", "Containers", "end_leftovers"]

STOP_LIMIT = 30.0
"""Seconds a container is given to shut down before it is killed."""
LOOK_FOR_LOSS = 0.25
"""Seconds between two looks at whether reads have failed."""
REMEMBERED = 64
"""Ended containers whose final figures are kept."""
REMEMBERED_TIMELINES = 4
"""And their timelines, which are larger."""

Tell = Callable[[dict[str, Any]], Awaitable[None]]


class Containers:
    """All of them. `place`: directory for mount points; `state`: for small files, one directory each.

    `systemd`: whether PID 1 is systemd (containers then run in units and scopes of it).
    """

    def __init__(
        self, nursery: trio.Nursery, images: Images, layers: Layers, place: Path, state: Path, *, systemd: bool
    ) -> None:
        self._nursery, self._images, self._layers = nursery, images, layers
        self.kept = Store()
        self._bases: set[int] = set()
        self._networks: set[int] = set()
        self._place, self._state, self.systemd = place, state, systemd
        self._known: dict[str, Container | None] = {}
        self._past: dict[str, dict[str, Any]] = {}
        self._timelines: dict[str, dict[str, Any]] = {}
        self._reads: dict[str, list[tuple[int, int, int]]] = {}
        place.mkdir(parents=True, exist_ok=True)
        state.mkdir(parents=True, exist_ok=True)

    # --- looking ----------------------------------------------------------------------------------

    def all(self) -> list[Container]:
        return [container for container in self._known.values() if container]

    def get(self, name: str) -> Container:
        """Raises UserError if there is no such container."""
        found = self._known.get(name)
        if found is None:
            names = ", ".join(sorted(container.options.name for container in self.all()))
            raise UserError(
                f"there is no container {name!r}" + (f"; running: {names}" if names else ""),
                "hostos container ls shows them",
            )
        return found

    def figures(self, name: str) -> dict[str, Any]:
        """What `Container.stats` gives; of an ended container, the final figures."""
        if self._known.get(name) is None and name in self._past:
            return self._past[name]
        return self.get(name).stats()

    def reads(self, name: str) -> list[tuple[int, int, int]]:
        """What `Container.reads` gives; also of the container that ended last."""
        if self._known.get(name) is None and name in self._reads:
            return self._reads[name]
        return self.get(name).reads()

    def timeline(self, name: str) -> dict[str, Any]:
        """What `Container.timeline` gives; of an ended container, the final one."""
        if self._known.get(name) is None and name in self._timelines:
            return self._timelines[name]
        return self.get(name).timeline()

    def new_name(self, image: str) -> str:
        """A free name, from the image's: `debian-13`, `debian-13-2` …"""
        stem = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in image.lower())
        stem = stem.strip("-")[:32].strip("-") or "container"
        names = [stem, *(f"{stem}-{number}" for number in range(2, 10000))]
        return next(name for name in names if name not in self._known)

    # --- making -----------------------------------------------------------------------------------

    async def prepare(
        self,
        options: Options,
        image: str,
        peers: tuple[str, ...],
        tell: Tell,
        *,
        bundle: dict[str, Any] | None = None,
        deadline: float = 30.0,
        read_deadline: float = 120.0,
        only_mount: bool = False,
        rest: Rest | None = None,
        trace: bool = False,
        web: tuple[str, ...] = (),
        key: bytes | None = None,
    ) -> Container:
        """Mount an image and make everything ready to run it. Raises UserError; then nothing is left.

        `deadline`: seconds for metadata and the first blocks; `read_deadline`: for each later read; `rest`:
        whether everything is fetched in the end (None: as the daemon was told); `trace`: note each
        read, and fetch nothing ahead; `web`: addresses of web seeds; `key`: of a private image.
        """
        name = options.name
        if name in self._known:
            raise UserError(
                f"a container is called {name!r} already",
                f"take another --name, or: hostos container stop {name}",
            )
        self._known[name] = None
        try:
            container = await self._prepare(
                options, image, peers, tell, bundle, deadline, read_deadline, only_mount, rest, trace, web, key
            )
        except BaseException:
            del self._known[name]
            raise
        self._known[name] = container
        self._past.pop(name, None)
        self._nursery.start_soon(self._watch, container)
        return container

    async def _prepare(
        self,
        options: Options,
        image: str,
        peers: tuple[str, ...],
        tell: Tell,
        bundle: dict[str, Any] | None,
        deadline: float,
        read_deadline: float,
        only_mount: bool,
        rest: Rest | None,
        trace: bool,
        web: tuple[str, ...],
        key: bytes | None,
    ) -> Container:
        began = time.monotonic()
        milestones: dict[str, float] = {}

        async def step(name: str) -> None:
            milestones[name] = time.monotonic()
            await tell(event("step", name=name, seconds=round(time.monotonic() - began, 3)))

        found = await self._images.load(image, peers, bundle=bundle, deadline=deadline, web=web)
        await step("metadata")
        manifest = found.manifest
        _check_architecture(manifest.architecture)
        _check_key(manifest, key)
        if not (options.init or only_mount or options.command or manifest.boot.command):
            raise UserError(
                f"image {manifest.name} names no command",
                "give one: hostos container boot … -- COMMAND, or boot its init",
            )
        base: int | None = None
        kept = await self._keep(options, found.image) if options.persist else None
        if kept is not None and options.private_users:
            base = kept.base
        elif options.private_users:
            base = make.free_base(self._bases)
        container = Container(
            options,
            found,
            base,
            self._place / options.name,
            self._state / options.name,
            time.time(),
            only_mounted=only_mount,
            began=began,
            milestones=milestones,
            changes=(kept.path if kept else self._place / options.name / "upper") / "changes",
        )
        if base is not None:
            # At once, and until everything is undone: others may be prepared meanwhile.
            self._bases.add(base)
            container.stack.callback(self._bases.discard, base)
        try:
            if isinstance(found, ImageBundle):
                self._images.shared.begin(found)
                container.offered = found.image
            # While the first blocks are on their way.
            try:
                async with trio.open_nursery() as meanwhile:
                    if not only_mount and options.network == "nat":
                        meanwhile.start_soon(self._make_network, container)
                    await self._mount_layers(container, found, peers, web, key, trace, rest, deadline, read_deadline)
            except BaseExceptionGroup as group:
                raise (group.subgroup(UserError) or group).exceptions[0] from None
            await step("layers")
            await self._publish(container)
            try:
                container.root = await in_thread(
                    mount_root,
                    container.stack,
                    [path for layer in container.layers for path in layer.paths],
                    container.place,
                    base=container.base,
                    upper_size=options.upper_size,
                    metacopy=any(layer.acls for layer in container.layers),
                    kept=kept.path if kept else None,
                    shifted=[layer.path for layer in container.layers if isinstance(layer.torrent, IpfsTree)],
                )
            except OSError as error:
                raise failure(f"container {options.name}: its root cannot be mounted: {error}") from None
            if not only_mount:
                binds = await in_thread(check_binds, options.binds, container.base)
                container.options = replace(options, binds=binds)
                await in_thread(container.write_state)
            await step("root")
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._undo(container)
            raise
        return container

    async def _mount_layers(
        self,
        container: Container,
        found: ImageBundle | IpfsImage,
        peers: tuple[str, ...],
        web: tuple[str, ...],
        key: bytes | None,
        trace: bool,
        rest: Rest | None,
        deadline: float,
        read_deadline: float,
    ) -> None:
        """All layers of the image, lowest first. Raises UserError."""
        options, manifest = container.options, found.manifest
        endpoints = await resolve(peers) if isinstance(found, ImageBundle) else []
        servers = [parse_web_seed(url) for url in web]
        command = () if options.init else options.command or manifest.boot.command
        # Who only mounts an image boots nothing, unless it is to be a machine's root.
        replayed = not trace and (options.init or not container.only_mounted)
        plan = found.trace.plan(command) if found.trace and replayed else ()
        for number, named in enumerate(found.layers):
            torrent = replace(named, owner=container.base or 0) if isinstance(named, IpfsTree) else named
            ahead = pieces(plan, number, torrent.piece_size)
            layer = await self._layers.acquire(
                torrent,
                endpoints,
                deadline,
                ahead=ahead,
                rest=rest,
                exact=trace,
                web=servers,
                key=layer_key(key, number) if key and manifest.layers[number].cipher else None,
            )
            container.plans.append(layer.plans[-1])
            if options.on_loss == "wait":
                layer.source.deadline = math.inf
            elif layer.users == 1 or math.isfinite(layer.source.deadline):
                layer.source.deadline = max(read_deadline, 1.0)
            container.layers.append(layer)
            container.before[torrent.info_hash] = 0 if layer.users == 1 else layer.source.stats().downloaded

    async def _make_network(self, container: Container) -> None:
        """A network of its own. Raises UserError."""
        container.network = next(number for number in range(network.MOST) if number not in self._networks)
        # At once, and until everything is undone: others may be prepared meanwhile.
        self._networks.add(container.network)
        container.stack.callback(self._networks.discard, container.network)
        try:
            await in_thread(network.make, container.stack, container.network, container.network_file)
        except OSError as error:
            raise failure(f"container {container.options.name}: its network cannot be made: {error}") from None

    async def _publish(self, container: Container) -> None:
        """Have its ports listened on, for as long as it lives. Raises UserError."""
        if container.network is None:
            return
        _, address = network.addresses(container.network)
        for port in container.options.publish:
            port, scope = await published.serve(self._nursery, port, container.network_file, address)
            container.published.append(port)
            container.listening.append(scope)

    async def _keep(self, options: Options, image: str) -> Kept:
        """What the container's changes are added to. Raises UserError."""
        for other in self._known.values():
            if other is not None and other.options.persist == options.persist:
                raise UserError(
                    f"container {other.options.name} writes to what is kept as {options.persist!r}",
                    f"stop it: hostos container stop {other.options.name}; or take another --persist NAME",
                )
        kept: Kept = await in_thread(self.kept.take, options.persist, image)
        return kept

    def start_argv(self, container: Container) -> list[str]:
        """What runs it with the caller's standard input and output."""
        script = str(container.script)
        if self.systemd:
            return make.scope_argv(container.options.name, script, container.options.limits)
        return ["/bin/sh", script]

    # --- its life -----------------------------------------------------------------------------------

    async def _watch(self, container: Container) -> None:
        """Wait for it to start and to end, then undo it."""
        try:
            if container.only_mounted:
                await container.given_up.wait()
            elif await container.wait_for_start() and container.supervisor:
                async with trio.open_nursery() as nursery:
                    if container.options.on_loss == "stop":
                        nursery.start_soon(_stop_on_loss, container)
                    await container.supervisor.ended()
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                if container.supervisor and container.supervisor.alive:
                    await container.kill()
                await self._undo(container)
            del self._known[container.options.name]

    async def _undo(self, container: Container) -> None:
        """Unmount and forget. Never raises."""
        if container.layers:
            self._past[container.options.name] = {**container.stats(), "state": "ended"}
            while len(self._past) > REMEMBERED:
                del self._past[next(iter(self._past))]
            self._reads = {container.options.name: container.reads()}
            self._timelines[container.options.name] = container.timeline()
            while len(self._timelines) > REMEMBERED_TIMELINES:
                del self._timelines[next(iter(self._timelines))]
        for scope in container.listening:
            scope.cancel()
        if container.offered:
            self._images.shared.end(container.offered)
        await in_thread(container.stack.close)
        for layer, plan in zip(container.layers, container.plans, strict=False):
            layer.drop(plan)
            await self._layers.release(layer)
        container.layers = []
        await in_thread(shutil.rmtree, container.state, ignore_errors=True)
        await in_thread(forget, container.options.name)
        await in_thread(shutil.rmtree, make.unit_limits(container.options.name).parent, ignore_errors=True)
        if container.supervisor:
            container.supervisor.close()
            container.supervisor = None
        container.ended.set()

    async def start(self, container: Container, ready_within: float) -> bool:
        """Boot a container's init in the background; whether it said that it is up in that time.

        Raises UserError if it could not be started or ended at once.
        """
        if self.systemd:
            if properties := container.options.limits.properties():
                await in_thread(_write_limits, make.unit_limits(container.options.name), properties)
            argv = ["systemctl", "start", make.unit_name(container.options.name)]
            process = await trio.lowlevel.open_process(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        else:
            with container.log.open("wb") as log:
                process = await trio.lowlevel.open_process(
                    ["/bin/sh", str(container.script)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        self._nursery.start_soon(process.wait)
        ready = False
        with trio.move_on_after(max(ready_within, 1.0)):
            async with trio.open_nursery() as nursery:

                async def ended() -> None:
                    await container.ended.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(ended)
                await container.started.wait()
                # The unit is of Type=notify: systemctl returns when the init says that it is up.
                ready = await process.wait() == 0 if self.systemd else bool(await container.leader())
                if ready:
                    container.milestones["ready"] = time.monotonic()
                nursery.cancel_scope.cancel()
        if container.ended.is_set() or not container.started.is_set():
            name = container.options.name
            container.given_up.set()
            raise failure(f"container {name} ended as soon as it began", f"hostos container logs {name}")
        return ready

    async def leader(self, container: Container) -> int:
        """The container's first process. Raises UserError if it does not run."""
        return await container.leader()

    async def stop(self, name: str, deadline: float = STOP_LIMIT) -> bool:
        """End a container; whether it did so by itself within `deadline` seconds (else: killed)."""
        container = self.get(name)
        if container.supervisor is None:
            container.given_up.set()
            await container.ended.wait()
            return True
        gently = await container.halt(deadline)
        if not container.ended.is_set():
            await container.kill()
            await container.ended.wait()
        return gently

    async def stop_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for container in self.all():
                nursery.start_soon(self.stop, container.options.name, 3.0)


async def _stop_on_loss(container: Container) -> None:
    """Kill it as soon as one of its reads has failed: it can't go on in any way that is meant."""
    before = container.errors()
    while (why := container.errors()) == before:
        await trio.sleep(LOOK_FOR_LOSS)
    container.lost = why[-1]
    await container.kill()


def _write_limits(path: Path, properties: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[Service]\n" + "".join(f"{each}\n" for each in properties))


def _check_key(manifest: Manifest, key: bytes | None) -> None:
    private = any(layer.cipher for layer in manifest.layers)
    if private and key is None:
        raise UserError(
            f"image {manifest.name} is private, and its key was not given",
            "put the link with its key into a file: hostos container boot @FILE",
        )
    if key is not None and not private:
        raise UserError(f"image {manifest.name} is not private: a key is of no use", "leave it out")


def _check_architecture(architecture: str) -> None:
    here = os.uname().machine
    if architecture not in (here, "any"):
        raise UserError(
            f"the image is for {architecture}, this machine is {here}",
            f"boot it in a machine of its architecture: hostos up -m NAME --arch {architecture}; then: "
            "hostos container boot -m NAME …",
        )
