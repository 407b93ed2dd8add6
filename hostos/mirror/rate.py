"""A limit on bytes per second, shared by all who take from it."""

from __future__ import annotations

import asyncio
import time

BURST_S = 0.25


class Rate:
    """`limit`: bytes per second, 0 for none."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free_at = 0.0

    @property
    def piece(self) -> int:
        """Bytes to take at once, so that they don't come in bursts."""
        return max(4096, int(self.limit * BURST_S / 2)) if self.limit else 1 << 20

    async def take(self, count: int) -> None:
        """Returns when `count` more bytes may have passed."""
        if not self.limit:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now - BURST_S) + count / self.limit
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)
