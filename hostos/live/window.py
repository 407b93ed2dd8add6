"""How many bytes may be asked for ahead of need: enough to keep the link full, and no more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

WINDOW_LEAST, WINDOW_FIRST, WINDOW_MOST = 64 * 1024, 128 * 1024, 16 * 1024 * 1024
"""Bytes asked for ahead: the least, at first, and the most, which keeps 600 Mbit/s at 200 ms full."""
FASTER, SLOWER = 1.2, 0.4
"""A window counts as better, or as too large, when the rate becomes that many times what it was."""
QUEUE = 0.06
"""Seconds at least that pieces may come later than the quickest did, because they queue for a link that is full; as
long as that took, if it is more. Twice that, and the window is too large."""
FAR = 0.012
"""Seconds on the way from which on libtorrent is to have a stock of pieces to ask for. Whenever it has asked a peer for
all that it is to fetch, "end game", it asks for nothing more until all of that has come, which costs a round trip
(`peer_connection::desired_queue_size`)."""
FORGET = 20.0
"""Seconds after which the quickest no longer counts: the path may have changed."""


class Window:
    """How many bytes may be under way: grows like a TCP connection that starts, until it is of no use, or others are
    kept waiting (as in LEDBAT, RFC 6817)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.size = WINDOW_FIRST
        self._piece = 0
        self._best = 0.0
        self._round, self._low = 0, math.inf
        self._began = clock()
        self._quickest, self._measured = math.inf, self._began

    def restart(self) -> None:
        """The window was not full: what comes now says nothing about it."""
        self._round, self._low, self._began = 0, math.inf, self._clock()

    def arrived(self, size: int, waited: float | None = None) -> None:
        """`size` bytes came while the window was full; `waited`: seconds since they were asked for."""
        now = self._clock()
        self._piece = size
        if waited is not None:
            self._low = min(self._low, waited)
            if waited < self._quickest or now - self._measured > FORGET:
                self._quickest, self._measured = waited, now
        self._round += size
        if self._round < self.size:
            return
        rate, late = self._round / max(now - self._began, 1e-6), self._low - self._quickest
        queue = max(QUEUE, self._quickest)
        self.restart()
        if rate > FASTER * self._best:
            self._best = rate
            if not late > queue:
                self.size = min(2 * self.size, WINDOW_MOST)
        elif rate < SLOWER * self._best:
            self._best = rate / FASTER
            self.size = max(self.size // 2, WINDOW_LEAST)
        elif late > 2 * queue:
            self.size = max(self.size // 2, WINDOW_LEAST)

    @property
    def far(self) -> bool:
        """Whether pieces are longer on their way than the link takes to carry them."""
        return self._best > 0 and FAR < self._quickest - self._piece / self._best < math.inf
