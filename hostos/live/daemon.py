"""The daemon: one libtorrent session, one FUSE file system, the containers, and a socket to ask.

Everything runs in one trio loop; whatever may block in the kernel runs in threads.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from hostos.errors import UserError, failure
from hostos.live import container as make
from hostos.live import fuse, protocol, syscalls
from hostos.live.cache import Cache
from hostos.live.containers import Container, Containers, end_leftovers
from hostos.live.image import Images
from hostos.live.kept import Store
from hostos.live.mounts import Layers, clean_up, in_thread
from hostos.live.operations import Operations
from hostos.live.protocol import Request
from hostos.live.schedule import REST_OFF, Rest
from hostos.live.session import Swarm
from hostos.live.swarm_settings import SwarmSettings

CHUNK = 65536
LOOK_OVER, LOOK_OVER_IDLE = 2.0, 60.0
"""Seconds between two looks at the size of the cache, while something is mounted, and otherwise."""


@dataclass(frozen=True)
class Config:
    """Where the daemon works. `state`: small files of the containers; `listen`: for peers.

    `cache_size`: keep the cache in a tmpfs of this size, which outlives the daemon (None: wherever the
    directory is), at most `limit` bytes of layers (None: most of the file system). `rest`: whether whole
    layers are fetched while nobody reads. `systemd`: run containers as units. `swarm`: how strangers are
    dealt with until a request says otherwise.
    """

    socket: Path
    cache: Path
    mounts: Path
    state: Path
    listen: str = "0.0.0.0:6881"
    cache_size: str | None = None
    limit: int | None = None
    rest: Rest = REST_OFF
    systemd: bool = True
    keep: Path | None = None
    swarm: SwarmSettings = field(default_factory=SwarmSettings)
    started: Callable[[Operations], Awaitable[None]] | None = None
    """Run beside all else from the moment on at which the daemon can be asked."""


class Connection:
    """One client. Containers it holds are ended when it goes away."""

    def __init__(self, operations: Operations, stream: trio.SocketStream) -> None:
        self._operations, self._stream = operations, stream
        self.held: list[Container] = []

    async def tell(self, message: dict[str, Any]) -> None:
        # A client that went away in the middle is noticed where the next request is awaited.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_all(protocol.encode(message))

    async def serve(self) -> None:
        try:
            async with self._stream:
                buffer = bytearray()
                with suppress(trio.BrokenResourceError, ConnectionResetError):
                    while chunk := await self._stream.receive_some(CHUNK):
                        buffer += chunk
                        while (end := buffer.find(b"\n", max(0, len(buffer) - len(chunk)))) >= 0 or (
                            (end := buffer.find(b"\n")) >= 0
                        ):
                            line = bytes(buffer[:end])
                            del buffer[: end + 1]
                            await self.tell(await self._answer(line))
                        if len(buffer) > protocol.MAX_LINE:
                            return
        finally:
            with trio.CancelScope(shield=True):
                for container in self.held:
                    if not container.ended.is_set():
                        with suppress(UserError):
                            await self._operations.containers.stop(container.options.name, 3.0)

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = Request.parse(line)
            operation = self._operations.by_name.get(request.op)
            if operation is None:
                raise UserError(f"request to the live-boot daemon: it has no operation {request.op[:40]!r}")
            return protocol.success(**await operation(request, self))
        except UserError as error:
            return protocol.failed(error)
        except OSError as error:
            return protocol.failed(failure(f"live boot: {error}"))
        except Exception as error:
            # A mistake in one operation must not take the other containers' layers away.
            log("".join(traceback.format_exception(error)))
            return protocol.failed(failure(f"live boot: internal error: {error!r}", "please report its log"))


async def _signals(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        async for _ in received:
            scope.cancel()
            return


async def _listener(path: Path) -> trio.SocketListener:
    """The socket systemd passed (sd_listen_fds(3)), or one of our own at `path`."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        return trio.SocketListener(trio.socket.fromfd(3, trio.socket.AF_UNIX, trio.socket.SOCK_STREAM))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Moved to its name once it listens: whoever waits for it can connect when it is there.
    new = path.with_name(f"{path.name}~")
    new.unlink(missing_ok=True)
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        await listener.bind(str(new))
    except OSError as error:
        raise UserError(f"cannot listen on {path}: {error}", "give a shorter --socket") from None
    finally:
        os.umask(mask)
    listener.listen(64)
    new.rename(path)
    return trio.SocketListener(listener)


def log(message: str) -> None:
    """To stderr, which is the journal."""
    print(message, file=sys.stderr, flush=True)


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT; then end the containers and undo every mount.

    Raises UserError: another daemon has this cache, FUSE is missing, the port is taken.
    """
    for directory in (config.cache, config.mounts, config.state):
        directory.mkdir(parents=True, exist_ok=True)
    if config.cache_size and not config.cache.is_mount():
        _mount_cache(config.cache, config.cache_size)
    lock = os.open(config.cache / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UserError(
            f"a live-boot daemon is using {config.cache} already", "stop it, or give another --cache"
        ) from None
    try:
        if ended := end_leftovers(config.state, config.mounts):
            log(f"ended {ended} containers that an earlier daemon left")
        clean_up(config.mounts)
        place = config.mounts / "fuse"
        place.mkdir(exist_ok=True)
        files = fuse.Files()
        try:
            fuse.mount(files, place)
        except (OSError, RuntimeError) as error:
            raise failure(f"cannot mount a FUSE file system at {place}: {error}") from None
        try:
            trio.run(_serve, config, files, place)
        finally:
            pyfuse3.close(unmount=True)
            clean_up(config.mounts)
            config.socket.unlink(missing_ok=True)
    except BaseExceptionGroup as group:
        raise _first(group) from None
    finally:
        os.close(lock)


def _mount_cache(place: Path, size: str) -> None:
    if not make.SIZE.fullmatch(size):
        raise UserError(f"not a size for the cache: {size[:40]!r}", "write e.g. 512m or 60%")
    try:
        syscalls.mount("hostos-cache", place, "tmpfs", syscalls.MS_NODEV | syscalls.MS_NOSUID, f"size={size},mode=0700")
    except OSError as error:
        raise failure(f"cannot mount a tmpfs at {place}: {error.strerror}") from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a person should be told of several errors at once: the first they can act on."""
    known = group.subgroup(UserError)
    error: BaseException = known or group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _serve(config: Config, files: fuse.Files, place: Path) -> None:
    swarm = Swarm(config.listen)
    swarm.log = log
    swarm.apply(config.swarm)
    listener = await _listener(config.socket)
    try:
        async with trio.open_nursery() as services:
            services.start_soon(swarm.run)
            services.start_soon(_serve_files)
            # It asks this very process, which would wait for it for ever if a service has failed meanwhile.
            await trio.to_thread.run_sync(fuse.set_read_ahead, place, fuse.READ_AHEAD_KIB, abandon_on_cancel=True)
            layers = Layers(swarm, services, files, place, config.cache / "layers", config.mounts / "layers")
            layers.rest = config.rest
            (config.cache / "images").mkdir(exist_ok=True)
            images = Images(swarm, services, config.cache / "images", layers.blocks)
            containers = Containers(
                services, images, layers, config.mounts / "containers", config.state, systemd=config.systemd
            )
            cache = Cache(config.cache, lambda: {layer.torrent.info_hash for layer in layers.mounted()}, config.limit)
            layers.used = cache.use
            services.start_soon(_keep_within, cache, layers)
            containers.kept = Store(config.keep)
            operations = Operations(images, layers, containers, cache, config.state)
            try:
                async with trio.open_nursery() as clients:
                    clients.start_soon(_signals, clients.cancel_scope)

                    async def serve(stream: trio.SocketStream) -> None:
                        await Connection(operations, stream).serve()

                    if config.started:
                        clients.start_soon(config.started, operations)
                    log(f"ready: {config.socket}, peers on {config.listen}")
                    await trio.serve_listeners(serve, [listener])
            finally:
                with trio.CancelScope(shield=True):
                    await containers.stop_all()
                pyfuse3.terminate()
            services.cancel_scope.cancel()
    finally:
        swarm.close()


async def _keep_within(cache: Cache, layers: Layers) -> None:
    """Give up what was used longest ago whenever the cache gets too large."""
    while True:
        async with layers.still:
            try:
                free = await in_thread(cache.evict)
            except OSError as error:
                log(f"the cache cannot be looked over: {error}")
            else:
                if free:
                    log(f"gave up {free / 1e6:.1f} MB of the cache: it was full")
        # What was mounted at the last look may be given up now.
        with trio.move_on_after(LOOK_OVER if layers.mounted() else LOOK_OVER_IDLE):
            await layers.changed.wait()
            await trio.sleep(LOOK_OVER)


async def _serve_files() -> None:
    await pyfuse3.main()
    # It returns when the file system was unmounted behind our back, and when we are ending.
    await trio.sleep(0)
