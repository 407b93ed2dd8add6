"""HTTP servers that are asked for something whose content is known beforehand by its hash: gateways, web seeds.

The best known one first; when it does not answer soon, the next beside it. What a server sends is proved
before it leaves this module, and one that sent wrong bytes is not asked for a while. Nobody is contacted
but those that were named.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import trio

from hostos.live.http import Answer, Connection, HttpError, Span
from hostos.live.url import Url

CONNECTIONS = 16
"""Most at once to one server."""
HEDGE = 1.5
"""Seconds after which the next server is asked, too."""
ATTEMPT = 15.0
"""Seconds one server is given for one answer."""
PAUSES = (0.2, 2.0)
"""Seconds before all are asked again: at first, and at most."""
BACK_OFF = (0.5, 10.0)
"""Seconds a server that failed is asked last: at first, and at most."""
BANS = (10.0, 60.0, 600.0)
"""Seconds a server that sent wrong bytes is not asked at all: the first time, the second …"""
MAX_SERVERS = 16


@dataclass(frozen=True)
class Wanted:
    """What is asked for. `name`: for messages; `path`: below the server's own; `limit`: most bytes;
    `proves`: whether these bytes are it; `types`: media types it may have (none: any); `span`: a part
    of the file; `optional`: that it does not exist is an answer, too, of no bytes."""

    name: str
    path: str
    limit: int
    proves: Callable[[bytes], bool]
    accept: str = "*/*"
    types: tuple[str, ...] = ()
    span: Span | None = None
    optional: bool = False


@dataclass
class Server:
    """One server and what is known of it. Times are `time.monotonic()`."""

    url: Url
    limit: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(CONNECTIONS))
    idle: list[Connection] = field(default_factory=list)
    downloaded: int = 0
    answers: int = 0
    seconds: float = 0.05
    """Smoothed time of an answer."""
    failures: int = 0
    """In a row."""
    lies: int = 0
    avoid_until: float = -math.inf
    banned_until: float = -math.inf
    trouble: str = ""

    def failed(self, why: str) -> None:
        self.trouble = why
        self.failures += 1
        pause = min(BACK_OFF[0] * 2 ** min(self.failures - 1, 10), BACK_OFF[1])
        self.avoid_until = time.monotonic() + pause

    def lied(self) -> None:
        self.trouble = "sent wrong bytes"
        self.banned_until = time.monotonic() + BANS[min(self.lies, len(BANS) - 1)]
        self.lies += 1

    def delivered(self, size: int, seconds: float) -> None:
        self.failures, self.trouble = 0, ""
        self.avoid_until = -math.inf
        self.downloaded += size
        self.answers += 1
        self.seconds += (seconds - self.seconds) / 8


class Servers:
    """Those that may be asked for one image. `log`: where news about them goes."""

    kind = "server"
    """What they are called in messages."""

    def __init__(self, urls: Iterable[Url], log: Callable[[str], None] = lambda _message: None) -> None:
        self._log = log
        self._all: dict[Url, Server] = {}
        self.wrong = 0
        """Answers that were not what was asked for."""
        self.wasted = 0
        """Bytes of those."""
        self.closed = False
        self.hedged = 0
        """Times a second server was asked as the first took too long."""
        for url in urls:
            self.add(url)

    def add(self, url: Url) -> None:
        if url not in self._all and len(self._all) < MAX_SERVERS:
            self._all[url] = Server(url)

    def all(self) -> list[Server]:
        return list(self._all.values())

    async def close(self) -> None:
        """Ask nobody any more; what is being fetched gives up."""
        self.closed = True
        for server in self._all.values():
            while server.idle:
                await server.idle.pop().close()

    # --- asking -------------------------------------------------------------------------------------

    async def obtain(self, wanted: Wanted) -> bytes | None:
        """The bytes, proved; None if this was closed. Tries for ever: the caller sets the time limit
        (`why_late` then says why it passed)."""
        pause = PAUSES[0]
        while not self.closed:
            if (content := await self.ask(wanted)) is not None:
                return content
            await trio.sleep(pause)
            pause = min(2 * pause, PAUSES[1])
        return None

    def _order(self) -> list[Server]:
        """Whom to ask, best first."""
        now = time.monotonic()
        usable = [server for server in self._all.values() if server.banned_until <= now]
        return sorted(
            usable,
            key=lambda each: (each.avoid_until > now, (1 + each.limit.statistics().borrowed_tokens) * each.seconds),
        )

    async def ask(self, wanted: Wanted) -> bytes | None:
        """Ask each of them once, each beside those before it; None if none of them has it."""
        order = self._order()
        if len(order) == 1:
            return await self._attempt(order[0], wanted)
        found: list[bytes] = []
        async with trio.open_nursery() as nursery:
            for place, server in enumerate(order):
                over = trio.Event()

                async def one(server: Server = server, over: trio.Event = over) -> None:
                    content = await self._attempt(server, wanted)
                    if content is not None:
                        found.append(content)
                        nursery.cancel_scope.cancel()
                    over.set()

                nursery.start_soon(one)
                if place + 1 < len(order):
                    with trio.move_on_after(HEDGE) as waited:
                        await over.wait()
                    self.hedged += waited.cancelled_caught
        return found[0] if found else None

    async def _attempt(self, server: Server, wanted: Wanted) -> bytes | None:
        began = time.monotonic()
        async with server.limit:
            try:
                with trio.fail_after(ATTEMPT):
                    answer = await self._get(server, wanted)
            except (HttpError, trio.TooSlowError) as error:
                self._failed(server, str(error) or f"no answer within {ATTEMPT:g} s")
                return None
        if wanted.optional and answer.status == 404:
            return b""
        if answer.status != (206 if wanted.span else 200):
            self._failed(server, f"answered with status {answer.status}")
            return None
        if wanted.types and answer.type not in wanted.types:
            self._failed(server, f"answered with {answer.type[:40]}, not with what was asked for")
            return None
        if not wanted.proves(answer.body):
            self.wrong += 1
            self.wasted += len(answer.body)
            server.lied()
            self._log(f"{self.kind} {server.url} sent wrong bytes for {wanted.name}: not asked for a while")
            return None
        server.delivered(len(answer.body), time.monotonic() - began)
        return answer.body

    def _failed(self, server: Server, why: str) -> None:
        if why != server.trouble:
            self._log(f"{self.kind} {server.url}: {why}")
        server.failed(why)

    async def _get(self, server: Server, wanted: Wanted) -> Answer:
        while True:
            if self.closed:
                raise HttpError("closed")
            connection = server.idle.pop() if server.idle else await Connection.open(server.url)
            again = not connection.fresh
            done = False
            try:
                answer = await connection.get(wanted.path, wanted.accept, wanted.limit, wanted.span)
                done = connection.reusable
                return answer
            except HttpError:
                # The server may have closed a connection that was idle: a new one tells.
                if not again:
                    raise
            finally:
                if done and not self.closed:
                    server.idle.append(connection)
                else:
                    with trio.CancelScope(shield=True):
                        await connection.close()

    # --- telling ------------------------------------------------------------------------------------

    @property
    def downloaded(self) -> int:
        return self.wasted + sum(server.downloaded for server in self._all.values())

    @property
    def banned(self) -> int:
        now = time.monotonic()
        return sum(server.banned_until > now for server in self._all.values())

    def describe(self) -> list[dict[str, Any]]:
        """For `container stats`, as peers are."""
        return [
            {"peer": str(each.url), "downloaded": each.downloaded, "uploaded": 0, "suspicion": each.lies}
            for each in self._all.values()
        ]

    def why_late(self) -> str:
        """Who was asked in vain, and why."""
        if not self._all:
            return f"no {self.kind} is known"
        return "asked " + "; ".join(
            f"{server.url}" + (f" ({server.trouble})" if server.trouble else "") for server in self._all.values()
        )
