"""What peers may ask for: `GET /sha256/<hex>`, with ranges. Verified files only, and nothing else.

Which files there are is not told; who knows a file's hash may have it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from aiohttp import web

from hostos.mirror import answer
from hostos.mirror.cluster import Cluster
from hostos.mirror.errors import RefusedError
from hostos.mirror.ledger import Ledger
from hostos.mirror.rate import Rate
from hostos.mirror.settings import join_address
from hostos.mirror.store import Store

AT_ONCE = 64
"""Requests that are answered at the same time,"""
AT_ONCE_EACH = 16
"""and how many of them for one address."""
_PATH = re.compile(r"/sha256/([0-9a-f]{64})")


@dataclass
class PeerServer:
    store: Store
    ledger: Ledger
    cluster: Cluster
    rate: Rate
    in_flight: Counter[str] = field(default_factory=Counter)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        who = request.remote or "?"
        self.in_flight[who] += 1
        try:
            return await self._answer(request, who)
        except RefusedError as error:
            return answer.refused(request, error)
        finally:
            self.in_flight[who] -= 1
            if not self.in_flight[who]:
                del self.in_flight[who]

    async def _answer(self, request: web.BaseRequest, who: str) -> web.StreamResponse:
        found = _PATH.fullmatch(request.raw_path)
        if request.method not in ("GET", "HEAD"):
            raise RefusedError(405, "peers get files")
        if not found:
            raise RefusedError(404, "no such thing here")
        authorization = request.headers.get("Authorization", "")
        if not self.cluster.admits(request.method, request.raw_path, request.headers.get("Range", ""), authorization):
            raise RefusedError(403, "for members of the cluster only")
        if self.in_flight.total() > AT_ONCE or self.in_flight[who] > AT_ONCE_EACH:
            raise RefusedError(503, "too many requests at once")
        size = self.store.size(found[1])
        if size is None:
            raise RefusedError(404, "not here")
        address = join_address(who, 0).removesuffix(":0")
        said = answer.FileAnswer(request, found[1], size, "", None)
        return await answer.stored(
            said, self.store.path(found[1]), lambda count: self.ledger.count_peer(address, sent=count), self.rate
        )
