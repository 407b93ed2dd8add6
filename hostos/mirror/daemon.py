"""The package cache as a background process. `python -m hostos.mirror.daemon`

Started by `hostos.mirror.control`. It watches over a worker, the process that does everything, and
starts it again should it die: a package manager whose proxy is gone can't do anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from hostos import __version__, background
from hostos.background import log
from hostos.errors import UserError
from hostos.mirror import upstreams as configured
from hostos.mirror.apt import AptArchives
from hostos.mirror.catalogue import Catalogue, Known
from hostos.mirror.cluster import Cluster
from hostos.mirror.contents import Contents, Wanted
from hostos.mirror.documents import Fetcher
from hostos.mirror.ledger import Ledger
from hostos.mirror.location import to_url
from hostos.mirror.pacman import PacmanRepositories
from hostos.mirror.peer_server import PeerServer
from hostos.mirror.peers import Peers
from hostos.mirror.proxy import Proxy
from hostos.mirror.rate import Rate
from hostos.mirror.settings import PEER_PORT, Settings, join_address, parse_address, read_key
from hostos.mirror.store import Store
from hostos.mirror.upkeep import Upkeep
from hostos.mirror.upstreams import Upstreams
from hostos.paths import private_dir

FLUSH_S = 1.0
CONNECTIONS = 64
CONNECTIONS_EACH = 8
"""At the same time, to all mirrors and to each."""
DESCRIPTORS = 4096


def architectures() -> tuple[str, ...]:
    """What apt here installs packages of."""
    with contextlib.suppress(OSError):
        own = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=False).stdout
        more = subprocess.run(
            ["dpkg", "--print-foreign-architectures"], capture_output=True, text=True, check=False
        ).stdout
        if found := (*own.split(), *more.split()):
            return found
    return ({"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, "amd64"),)


class Configured:
    """The archives, read again when their file has changed. A file that can't be used changes nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: object = None
        self._read = Upstreams()
        self.current()

    def current(self) -> Upstreams:
        try:
            status = self.path.stat()
            stamp: object = (status.st_mtime_ns, status.st_ino)
        except OSError:
            stamp = None
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._read = configured.load(self.path) or Upstreams()
            except UserError as error:
                log(error.message)
        return self._read


class Worker:
    """Everything that serves, wired together."""

    def __init__(self, settings: Settings, place: background.Place, data: Path, upstreams: Path) -> None:
        self.settings, self.place = settings, place
        self.began = time.time()
        self.stopping = asyncio.Event()
        private_dir(data)
        self.ledger = Ledger(data / "ledger.db")
        self.catalogue = Catalogue(data / "catalogue.db")
        self.store = Store(data, self.ledger, settings.size)
        self.store.reconcile()
        self.configured = Configured(upstreams)
        self.data = data
        self.listening: list[str] = []
        self.sharing = ""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, ready: Callable[[], None]) -> None:
        """Raises UserError if it can't listen."""
        settings = self.settings
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        async with contextlib.AsyncExitStack() as stack:
            session = await stack.enter_async_context(_session(CONNECTIONS_EACH))
            peer_session = await stack.enter_async_context(_session(0))
            cluster = Cluster(read_key(settings.cluster_key) if settings.cluster_key else b"")
            download = Rate(settings.download_limit)
            self.peers = Peers(self.ledger, cluster, peer_session, download, log)
            for address in settings.peers:
                self.peers.add(*parse_address(address, "--peer", PEER_PORT), "static")
            contents = self.contents = Contents(
                self.store, self.ledger, self.peers, session, download, log, settings.offline, settings.proxy
            )
            stack.push_async_callback(contents.close)
            fetcher = Fetcher(session, settings.proxy)
            apt = AptArchives(
                self.catalogue, contents, self._entries, fetcher, architectures(), log, settings.offline, self._indexed
            )
            pacman = PacmanRepositories(
                self.data / "pacman", self.catalogue, contents, fetcher, log, settings.offline, self._indexed
            )
            self.apt, self.pacman = apt, pacman
            self.upkeep = Upkeep(settings, self.catalogue, contents, self._wanted, log)
            self.proxy = Proxy(self.configured.current, apt, pacman, contents, self.ledger, log)
            for text in settings.listen:
                try:
                    self.listening.append(await _listen(stack, self.proxy.handle, text, "--listen"))
                except UserError as error:
                    if not (text.startswith("[::1]") and self.listening):
                        raise
                    log(f"{error.message}; this machine may have no IPv6")
            share = ("", 0)
            if settings.share:
                server = PeerServer(self.store, self.ledger, cluster, Rate(settings.upload_limit))
                self.sharing = await _listen(stack, server.handle, settings.share, "--share")
                share = parse_address(self.sharing, "--share")
            await self._find_peers(stack, share, cluster)
            contents.verified = self._verified
            control = await background.Control(self.place, self.answer).open()
            stack.callback(control.close)
            ready()
            self._go(self.upkeep.run())
            await self._until_stopped()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self.place.socket.unlink(missing_ok=True)
        self.ledger.close()
        self.catalogue.close()

    async def _find_peers(self, stack: contextlib.AsyncExitStack, share: tuple[str, int], cluster: Cluster) -> None:
        settings = self.settings
        self.finder = None
        if settings.lan:
            from hostos.mirror.discovery import Discovery

            discovery = Discovery(*share, cluster, self.peers, log)
            stack.push_async_callback(discovery.close)
            try:
                await discovery.start()
            except OSError as error:
                raise UserError(f"--lan: no multicast here: {error.strerror}", "name peers with --peer") from None
        if settings.dht:
            from hostos.mirror.dht import Finder

            nodes = [parse_address(node, "--dht") for node in settings.dht]
            self.finder = Finder(share[0], nodes, cluster, share[1], lambda sha256: self.store.size(sha256) is not None)
            self.contents.finder = self.finder
            for sha256, _ in self.store.walk():
                self.finder.announce(sha256)
            self._go(self.finder.run())

    async def _until_stopped(self) -> None:
        while not self.stopping.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), FLUSH_S)
            with contextlib.suppress(sqlite3.Error):
                self.ledger.flush()

    def _go(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log(f"{type(error).__name__}: {error}")

    # --- what parts tell each other ---

    def _entries(self, location: str) -> list[configured.Apt]:
        return self.configured.current().find_apt(location)

    def _verified(self, known: Known) -> None:
        self.apt.learn(known)
        if self.finder is not None:
            self.finder.announce(known.sha256)

    def _indexed(self, location: str) -> None:
        if self.settings.prefetch and not self.settings.offline:
            self._go(self.upkeep.prefetch(location))

    def _wanted(self, known: Known) -> Wanted | None:
        upstreams = self.configured.current()
        entries = upstreams.find_apt(known.location)
        if not entries:
            return None  # pacman's packages are not fetched without being asked for
        base = entries[0].base
        urls = dict.fromkeys(to_url(entry.url, known.location[len(base) + 1 :]) for entry in entries)
        return Wanted(known, tuple(urls), base, asked=False)

    # --- control ---

    def answer(self, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        if operation == "stop":
            self.stopping.set()
        elif operation == "stats":
            return {"archives": self.ledger.traffic(), "peers": self.ledger.peers()}
        elif operation != "status":
            raise ValueError(f"unknown operation {operation!r}")
        return self.status()

    def status(self) -> dict[str, Any]:
        files, size = self.store.ledger.total()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "pid": os.getpid(),
            "since": self.began,
            "listen": self.listening,
            "share": self.sharing,
            "offline": self.settings.offline,
            "store": str(self.store.root),
            "files": files,
            "size": size,
            "limit": self.store.limit,
            "known_files": self.catalogue.count(),
            "arriving": len(self.contents.active),
            "in_flight": self.proxy.in_flight,
            "peers": self.peers.describe(),
            "dht": self.finder.status() if self.finder else None,
            "archives": configured.describe(self.configured.current()),
            "max_rss": usage.ru_maxrss * 1024,
        }


def _session(each: int) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=CONNECTIONS, limit_per_host=each, ttl_dns_cache=60)
    return aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        headers={"User-Agent": f"hostos-mirror/{__version__}"},
        read_bufsize=1 << 18,
    )


async def _listen(stack: contextlib.AsyncExitStack, handler: Any, text: str, option: str) -> str:
    """Serve `handler` at ADDRESS:PORT (port 0 is any); returns where it is."""
    host, port = parse_address(text, option, None) if not text.endswith(":0") else (text[:-2].strip("[]"), 0)
    runner = web.ServerRunner(web.Server(handler, access_log=None, keepalive_timeout=60))
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host, port, shutdown_timeout=1, backlog=512).start()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"{option} {text}: {reason}") from None
    address = runner.addresses[0]
    return join_address(str(address[0]), int(address[1]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hostos.mirror.daemon")
    for name in ("state", "socket", "data", "upstreams", "settings"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args(arguments)
    settings = Settings.from_json(options.settings.read_text())
    ready = background.detach()
    place = background.Place(options.state, options.socket, "mirror")
    with background.hold(place) as alone:
        if not alone:
            log("another mirror runs already")
            return 3
        background.write_info(place)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, DESCRIPTORS)), hard))

        def work(tell: Callable[[], None]) -> int:
            log(f"hostos {__version__}: package cache in {options.data}")
            try:
                asyncio.run(_run(settings, place, options.data, options.upstreams, tell))
            except (UserError, sqlite3.Error) as error:
                log(f"error: {error.message if isinstance(error, UserError) else f'{options.data}: {error}'}")
                return 2
            log("stopped")
            return 0

        status = background.supervise(work, ready)
        place.info.unlink(missing_ok=True)
    return status


def _expected(record: logging.LogRecord) -> bool:
    """Leave out of the log what clients do: requests that are none, and going away."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (HttpProcessingError, ConnectionError))


async def _run(
    settings: Settings, place: background.Place, data: Path, upstreams: Path, ready: Callable[[], None]
) -> None:
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("aiohttp.server").addFilter(_expected)
    # It warns, with a traceback, whenever a network is away.
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    await Worker(settings, place, data, upstreams).run(ready)


if __name__ == "__main__":
    sys.exit(main())
