"""What the daemon can be asked for: each request's fields checked, each answer made.

docs/live-boot.md lists them. None of them may block in the kernel outside a thread.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import libtorrent
import trio

from hostos import __version__
from hostos.errors import UserError
from hostos.live import container as make
from hostos.live import upper
from hostos.live.cache import Cache
from hostos.live.cid import looks_like_cid
from hostos.live.cid import parse as parse_cid
from hostos.live.container import Options, parse_bind
from hostos.live.containers import START_LIMIT, STOP_LIMIT, Container, Containers
from hostos.live.image import Images
from hostos.live.limits import Limits
from hostos.live.mounts import Layers, in_thread
from hostos.live.private import parse_key
from hostos.live.protocol import Request
from hostos.live.published import parse_port
from hostos.live.schedule import Rest
from hostos.live.swarm_settings import SwarmSettings
from hostos.live.torrents import parse_image_reference, parse_peer, parse_web_seed
from hostos.live.url import parse_gateway


class Connection(Protocol):
    """Whoever asks. Containers it holds are ended when it goes away."""

    held: list[Container]

    async def tell(self, message: dict[str, Any]) -> None: ...


class Operations:
    """Answers requests; see `Request` and docs/live-boot.md for the protocol."""

    def __init__(self, images: Images, layers: Layers, containers: Containers, cache: Cache, state: Path) -> None:
        self.images, self.layers, self.containers = images, layers, containers
        self.cache, self.state = cache, state
        self.began = time.time()
        self.by_name: dict[str, Callable[[Request, Connection], Awaitable[dict[str, Any]]]] = {
            "hello": self.hello,
            "inspect": self.inspect,
            "mount": self.mount,
            "unmount": self.unmount,
            "prepare": self.prepare,
            "start": self.start,
            "release": self.release,
            "list": self.list,
            "stats": self.stats,
            "timeline": self.timeline,
            "reads": self.reads,
            "cache": self.list_cache,
            "prune": self.prune,
            "pin": self.pin,
            "exec": self.exec,
            "capture": self.capture,
            "logs": self.logs,
            "stop": self.stop,
        }

    async def hello(self, request: Request, connection: Connection) -> dict[str, Any]:
        request.done()
        return {
            "hostos": __version__,
            "libtorrent": libtorrent.__version__,
            "kernel": os.uname().release,
            "pid": os.getpid(),
            "seconds": round(time.time() - self.began, 1),
            "containers": len(self.containers.all()),
            "layers": len(self.layers.mounted()),
            "swarm": self.images.swarm.settings.to_dict(),
        }

    def _settle(self, request: Request) -> None:
        """How to deal with strangers, if the request says so: for all images from now on."""
        if (settings := request.object("swarm")) is not None:
            self.images.swarm.apply(SwarmSettings.parse(settings))

    async def inspect(self, request: Request, connection: Connection) -> dict[str, Any]:
        self._settle(request)
        image, peers, web = _image(request)
        bundle, deadline = request.object("bundle"), request.number("deadline", 30.0, 0.1, 3600.0)
        request.done()
        found = await self.images.load(image, peers, bundle=bundle, deadline=deadline, web=web)
        return {"image": image, "manifest": found.manifest.to_json().decode(), "trace": found.trace is not None}

    async def mount(self, request: Request, connection: Connection) -> dict[str, Any]:
        container = await self._prepare(request, connection, only_mount=True)
        return {"name": container.options.name, "root": str(container.root)}

    async def unmount(self, request: Request, connection: Connection) -> dict[str, Any]:
        container = self.containers.get(request.text("name"))
        request.done()
        if not container.only_mounted:
            raise UserError(
                f"{container.options.name!r} is a container",
                f"hostos container stop {container.options.name}",
            )
        container.given_up.set()
        await container.ended.wait()
        return self.containers.figures(container.options.name)

    async def prepare(self, request: Request, connection: Connection) -> dict[str, Any]:
        container = await self._prepare(request, connection, only_mount=False)
        return {
            "name": container.options.name,
            "image": container.bundle.image,
            "image_name": container.bundle.manifest.name,
            "size": container.bundle.manifest.size,
            "root": str(container.root),
            "argv": self.containers.start_argv(container),
            "published": {str(port.inside): port.listen for port in container.published},
            "warnings": [
                f"{bind.source} belongs to nobody in the container: its file system can't shift owners"
                for bind in container.options.binds
                if not bind.shifted
            ],
        }

    async def _prepare(self, request: Request, connection: Connection, *, only_mount: bool) -> Container:
        self._settle(request)
        image, peers, web = _image(request)
        bundle = request.object("bundle")
        deadline = request.number("deadline", 30.0, 0.1, 3600.0)
        read_deadline = request.number("read_deadline", 120.0, 1.0, 86400.0)
        key = parse_key(text) if (text := request.text("key", "")) else None
        hold, trace = request.flag("hold"), request.flag("trace")
        rest = Rest.parse(complete) if (complete := request.text("complete", "")) else None
        name = request.text("name", "")
        if not name:
            found = await self.images.load(image, peers, bundle=bundle, deadline=deadline, web=web)
            name = self.containers.new_name(found.manifest.name)
        options = Options(
            name=name,
            command=request.texts("command"),
            init=request.flag("init"),
            console=_one_of(request, "console", "pipe", "interactive", "read-only"),
            binds=tuple(parse_bind(text) for text in request.texts("binds")),
            nspawn=request.texts("nspawn"),
            network=_one_of(request, "network", "none", "nat", "host"),
            read_only=request.flag("read_only"),
            private_users=request.flag("private_users", not only_mount),
            upper_size=request.text("upper_size", "50%"),
            limits=Limits.parse(request.text("memory", ""), request.text("cpus", ""), request.text("pids", "")),
            persist=request.text("persist", ""),
            on_loss=_one_of(request, "on_loss", "fail", "stop", "wait"),
            publish=tuple(parse_port(text) for text in request.texts("publish")),
        )
        request.done()
        if options.limits and not self.containers.systemd:
            raise UserError("limits need systemd as the machine's PID 1", "leave --memory, --cpus and --pids out")
        if options.persist and not options.private_users:
            raise UserError("what is kept belongs to private users", "leave --persist out")
        for bind in options.binds:
            if not Path(bind.source).exists():
                raise UserError(f"there is no {bind.source} on the machine to bind", "give a path of the machine")
        container = await self.containers.prepare(
            options,
            image,
            peers,
            connection.tell,
            bundle=bundle,
            deadline=deadline,
            read_deadline=read_deadline,
            only_mount=only_mount,
            rest=rest,
            trace=trace,
            web=web,
            key=key,
        )
        if hold:
            connection.held.append(container)
        return container

    async def start(self, request: Request, connection: Connection) -> dict[str, Any]:
        container = self.containers.get(request.text("name"))
        ready_within = request.number("ready_within", 0.0, 0.0, 3600.0)
        request.done()
        if not container.options.init or container.only_mounted:
            raise UserError(f"{container.options.name!r} was not prepared to boot its init")
        ready = await self.containers.start(container, ready_within)
        return {"name": container.options.name, "ready": ready}

    async def release(self, request: Request, connection: Connection) -> dict[str, Any]:
        """The final figures of a container whose command has ended."""
        name = request.text("name")
        request.done()
        with suppress(UserError):
            container = self.containers.get(name)
            with trio.move_on_after(START_LIMIT):
                if container.supervisor is None:
                    container.given_up.set()
                await container.ended.wait()
        return self.containers.figures(name)

    async def list(self, request: Request, connection: Connection) -> dict[str, Any]:
        request.done()
        return {"containers": [container.describe() for container in self.containers.all()]}

    async def stats(self, request: Request, connection: Connection) -> dict[str, Any]:
        name = request.text("name")
        request.done()
        return self.containers.figures(name)

    async def timeline(self, request: Request, connection: Connection) -> dict[str, Any]:
        """Which pieces came when and why, against what the container had reached."""
        name = request.text("name")
        request.done()
        return self.containers.timeline(name)

    async def reads(self, request: Request, connection: Connection) -> dict[str, Any]:
        """What a traced container has read for the first time: layer, offset, length, in order."""
        name = request.text("name")
        request.done()
        return {"reads": self.containers.reads(name)}

    async def list_cache(self, request: Request, connection: Connection) -> dict[str, Any]:
        request.done()
        return dict(await in_thread(self.cache.describe))

    async def prune(self, request: Request, connection: Connection) -> dict[str, Any]:
        """Remove what is not used: all of it, or some images."""
        names = request.texts("images")
        request.done()
        async with self.layers.still:
            images = [await in_thread(self.cache.find, name) for name in names] or [None]
            for image in images:
                if image and self.layers.using(image.layers):
                    raise UserError(f"image {image.name} is in use", "hostos container ls shows by whom")
            return {"free": sum([await in_thread(self.cache.prune, image) for image in images])}

    async def pin(self, request: Request, connection: Connection) -> dict[str, Any]:
        text, keep = request.text("image"), request.flag("keep", True)
        request.done()
        image = await in_thread(self.cache.find, text)
        await in_thread(self.cache.pin, image.hash, keep)
        return {"image": image.hash, "name": image.name, "pinned": keep}

    async def exec(self, request: Request, connection: Connection) -> dict[str, Any]:
        container = self.containers.get(request.text("name"))
        command, term = request.texts("command"), request.text("term", "")
        request.done()
        leader = await self.containers.leader(container)
        return {"argv": make.enter_argv(leader, list(command) or make.SHELL, term)}

    async def capture(self, request: Request, connection: Connection) -> dict[str, Any]:
        """What prints a container's changes as a tar stream (see hostos.live.upper)."""
        container = self.containers.get(request.text("name"))
        request.done()
        if container.only_mounted and not container.is_system:
            raise UserError(f"{container.options.name!r} is only mounted: nothing runs in it")
        # By its file, isolated: whoever runs it need not find this package, and it needs nothing of it.
        argv = [sys.executable, "-I", str(upper.__file__), str(container.changes), str(container.root)]
        argv.append(str(container.base or 0))
        if container.supervisor:
            argv.append(str(await self.containers.leader(container)))
        return {"image": container.bundle.image, "argv": argv, "system": container.is_system}

    async def logs(self, request: Request, connection: Connection) -> dict[str, Any]:
        name, follow = request.text("name"), request.flag("follow")
        request.done()
        figures = self.containers.figures(name)
        if not figures["init"]:
            raise UserError(f"container {name} runs a command: its output went to whoever started it")
        if self.containers.systemd:
            argv = ["journalctl", "--no-pager", "--output=cat", f"--unit={make.unit_name(name)}"]
            return {"argv": [*argv, "--follow"] if follow else argv}
        log = str(self.state / f"{name}.log")
        return {"argv": ["tail", "-n", "+1", "-f", log] if follow else ["cat", log]}

    async def stop(self, request: Request, connection: Connection) -> dict[str, Any]:
        name, deadline = request.text("name"), request.number("deadline", STOP_LIMIT, 0.0, 3600.0)
        request.done()
        gently = await self.containers.stop(name, deadline)
        return {**self.containers.figures(name), "gently": gently}


def _image(request: Request) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The image a request is about, and whom to ask for it: peers (gateways if it is a CID), and web seeds."""
    text, gateways, web = request.text("image"), request.texts("gateways"), request.texts("web_seeds")
    if looks_like_cid(text):
        if request.texts("peers") or web:
            raise UserError("a CID is fetched from gateways, not from peers or web seeds", "name one: --gateway URL")
        return str(parse_cid(text)), tuple(str(parse_gateway(gateway)) for gateway in gateways), ()
    if gateways:
        raise UserError("an info-hash is fetched from peers, not from gateways", "name one: --peer HOST:PORT")
    reference = parse_image_reference(text)
    peers = [parse_peer(peer) for peer in request.texts("peers")]
    servers = (str(parse_web_seed(url)) for url in web)
    return (
        reference.info_hash,
        tuple(dict.fromkeys((*peers, *reference.peers))),
        tuple(dict.fromkeys((*servers, *reference.web_seeds))),
    )


def _one_of(request: Request, name: str, *choices: str) -> Any:
    value = request.text(name, choices[0])
    if value not in choices:
        raise UserError(f"{name} {value[:40]!r} is not one of {', '.join(choices)}")
    return value
