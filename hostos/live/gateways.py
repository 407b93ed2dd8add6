"""Blocks from trustless gateways, each checked against its CID: wrong bytes never leave this module.

A gateway is asked for one block at a time (`?format=raw`, https://specs.ipfs.tech/http-gateways/trustless-gateway/).
The best known one first; when it does not answer soon, the next beside it. Nobody is contacted but those
that were named.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import trio

from hostos.errors import UserError
from hostos.live.cid import Cid
from hostos.live.dagpb import MAX_BLOCK
from hostos.live.http import Answer, Connection, HttpError, Url, parse_url

ACCEPT = "application/vnd.ipld.raw"
TYPES = (ACCEPT, "application/octet-stream", "")
CONNECTIONS = 16
"""Most at once to one gateway."""
HEDGE = 1.5
"""Seconds after which the next gateway is asked, too."""
ATTEMPT = 15.0
"""Seconds one gateway is given for one block."""
PAUSES = (0.2, 2.0)
"""Seconds before all are asked again: at first, and at most."""
BACK_OFF = (0.5, 10.0)
"""Seconds a gateway that failed is asked last: at first, and at most."""
BANS = (10.0, 60.0, 600.0)
"""Seconds a gateway that sent wrong bytes is not asked at all: the first time, the second …"""
MAX_GATEWAYS = 16


@dataclass
class Gateway:
    """One gateway and what is known of it. Times are `time.monotonic()`."""

    url: Url
    limit: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(CONNECTIONS))
    idle: list[Connection] = field(default_factory=list)
    downloaded: int = 0
    blocks: int = 0
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
        self.blocks += 1
        self.seconds += (seconds - self.seconds) / 8


class Gateways:
    """Those that may be asked for one image. `log`: where news about them goes."""

    def __init__(self, urls: Iterable[Url], log: Callable[[str], None] = lambda _message: None) -> None:
        self._log = log
        self._all: dict[Url, Gateway] = {}
        self.wrong = 0
        """Blocks that were not what their CID says."""
        self.wasted = 0
        """Bytes of those."""
        self.closed = False
        self.hedged = 0
        """Times a second gateway was asked as the first took too long."""
        for url in urls:
            self.add(url)

    def add(self, url: Url) -> None:
        if url not in self._all and len(self._all) < MAX_GATEWAYS:
            self._all[url] = Gateway(url)

    def all(self) -> list[Gateway]:
        return list(self._all.values())

    async def close(self) -> None:
        """Ask nobody any more; what is being fetched gives up."""
        self.closed = True
        for gateway in self._all.values():
            while gateway.idle:
                await gateway.idle.pop().close()

    # --- asking -------------------------------------------------------------------------------------

    async def fetch(self, cid: Cid) -> bytes | None:
        """The block, verified; None if this was closed. Tries for ever: the caller sets the time limit
        (`why_late` then says why it passed)."""
        if (inline := cid.inline) is not None:
            return inline
        pause = PAUSES[0]
        while not self.closed:
            if (block := await self._round(cid)) is not None:
                return block
            await trio.sleep(pause)
            pause = min(2 * pause, PAUSES[1])
        return None

    def _order(self) -> list[Gateway]:
        """Whom to ask, best first."""
        now = time.monotonic()
        usable = [gateway for gateway in self._all.values() if gateway.banned_until <= now]
        return sorted(
            usable,
            key=lambda each: (each.avoid_until > now, (1 + each.limit.statistics().borrowed_tokens) * each.seconds),
        )

    async def _round(self, cid: Cid) -> bytes | None:
        """Ask each of them once, each beside those before it; None if none of them has it."""
        order = self._order()
        if len(order) == 1:
            return await self._attempt(order[0], cid)
        found: list[bytes] = []
        async with trio.open_nursery() as nursery:
            for place, gateway in enumerate(order):
                over = trio.Event()

                async def ask(gateway: Gateway = gateway, over: trio.Event = over) -> None:
                    block = await self._attempt(gateway, cid)
                    if block is not None:
                        found.append(block)
                        nursery.cancel_scope.cancel()
                    over.set()

                nursery.start_soon(ask)
                if place + 1 < len(order):
                    with trio.move_on_after(HEDGE) as waited:
                        await over.wait()
                    self.hedged += waited.cancelled_caught
        return found[0] if found else None

    async def _attempt(self, gateway: Gateway, cid: Cid) -> bytes | None:
        began = time.monotonic()
        async with gateway.limit:
            try:
                with trio.fail_after(ATTEMPT):
                    answer = await self._get(gateway, f"/ipfs/{cid}?format=raw")
            except (HttpError, trio.TooSlowError) as error:
                self._failed(gateway, str(error) or f"no answer within {ATTEMPT:g} s")
                return None
        if answer.status != 200 or answer.type not in TYPES:
            what = f"answered with status {answer.status}"
            self._failed(gateway, what if answer.status != 200 else f"answered with {answer.type[:40]}, not a block")
            return None
        if not cid.matches(answer.body):
            self.wrong += 1
            self.wasted += len(answer.body)
            gateway.lied()
            self._log(f"gateway {gateway.url} sent wrong bytes for {cid}: not asked for a while")
            return None
        gateway.delivered(len(answer.body), time.monotonic() - began)
        return answer.body

    def _failed(self, gateway: Gateway, why: str) -> None:
        if why != gateway.trouble:
            self._log(f"gateway {gateway.url}: {why}")
        gateway.failed(why)

    async def _get(self, gateway: Gateway, path: str) -> Answer:
        while True:
            if self.closed:
                raise HttpError("closed")
            connection = gateway.idle.pop() if gateway.idle else await Connection.open(gateway.url)
            again = not connection.fresh
            done = False
            try:
                answer = await connection.get(path, ACCEPT, MAX_BLOCK)
                done = connection.reusable
                return answer
            except HttpError:
                # The server may have closed a connection that was idle: a new one tells.
                if not again:
                    raise
            finally:
                if done and not self.closed:
                    gateway.idle.append(connection)
                else:
                    with trio.CancelScope(shield=True):
                        await connection.close()

    # --- telling ------------------------------------------------------------------------------------

    @property
    def downloaded(self) -> int:
        return self.wasted + sum(gateway.downloaded for gateway in self._all.values())

    @property
    def banned(self) -> int:
        now = time.monotonic()
        return sum(gateway.banned_until > now for gateway in self._all.values())

    def describe(self) -> list[dict[str, Any]]:
        """For `container stats`, as peers are."""
        return [
            {"peer": str(each.url), "downloaded": each.downloaded, "uploaded": 0, "suspicion": each.lies}
            for each in self._all.values()
        ]

    def why_late(self) -> str:
        """Who was asked in vain, and why."""
        if not self._all:
            return "no gateway is known"
        return "asked " + "; ".join(
            f"{gateway.url}" + (f" ({gateway.trouble})" if gateway.trouble else "") for gateway in self._all.values()
        )


def parse_gateway(text: str) -> Url:
    """The address of a gateway: `http[s]://HOST[:PORT][/PATH]`. Raises UserError."""
    try:
        return parse_url(text)
    except UserError as error:
        raise UserError(f"--gateway: {error.message}", error.hint) from None
