"""Blocks from trustless gateways, each checked against its CID: wrong bytes never leave this module.

A gateway is asked for one block at a time (`?format=raw`, https://specs.ipfs.tech/http-gateways/trustless-gateway/).
"""

from __future__ import annotations

from hostos.live.cid import Cid
from hostos.live.dagpb import MAX_BLOCK
from hostos.live.servers import Servers, Wanted

ACCEPT = "application/vnd.ipld.raw"
TYPES = (ACCEPT, "application/octet-stream", "")


class Gateways(Servers):
    """Those that may be asked for one image."""

    kind = "gateway"

    async def fetch(self, cid: Cid) -> bytes | None:
        """The block, verified; None if this was closed. Tries for ever, as `obtain` does."""
        if (inline := cid.inline) is not None:
            return inline
        return await self.obtain(
            Wanted(str(cid), f"/ipfs/{cid}?format=raw", MAX_BLOCK, cid.matches, accept=ACCEPT, types=TYPES)
        )
