"""What happened to a layer's pieces and when: which was read first, which came why.

From it come the figures of `container stats`, the picture of `container timeline`, and the order in
which a traced boot reads its blocks. Times are `time.monotonic()`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

Why = Literal["demand", "trace", "ahead", "rest"]
"""Why a piece was fetched: somebody waited for it, the boot trace said so, reads went on in a row, or
because there was nothing else to do."""

SECTOR = 512
"""What the kernel's reads of a layer are multiples of, bytes: whole pages, or through a loop device less."""
MAX_READS = 1 << 20
"""Most reads that are noted one by one."""


class Journal:
    """The first read and the arrival of each piece; `exact`: also each read of new sectors, one by one."""

    def __init__(self, pieces: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.pieces = pieces
        self.read: dict[int, float] = {}
        self.came: dict[int, tuple[float, Why]] = {}
        self.reads: list[tuple[float, int, int]] = []
        self._sectors: set[int] | None = None
        self.used = 0
        """Pieces that the trace or read-ahead had fetched before their first read."""

    def watch(self) -> None:
        """From now on note each read."""
        self._sectors = set()

    def reading(self, offset: int, length: int, first: int, last: int) -> None:
        """Somebody reads these bytes (not none), in the pieces `first` to `last`."""
        now = self._clock()
        for piece in range(first, last + 1):
            if piece not in self.read:
                self.read[piece] = now
                if piece in self.came and self.came[piece][1] in ("trace", "ahead"):
                    self.used += 1
        if self._sectors is not None and len(self.reads) < MAX_READS:
            sectors = set(range(offset // SECTOR, (offset + length - 1) // SECTOR + 1))
            if not sectors <= self._sectors:
                self._sectors |= sectors
                self.reads.append((now, offset, length))

    def arrived(self, piece: int, why: Why) -> None:
        """It is verified."""
        self.came.setdefault(piece, (self._clock(), why))

    def counts(self) -> dict[str, int]:
        """Pieces that came, by reason."""
        found: dict[str, int] = dict.fromkeys(("demand", "trace", "ahead", "rest"), 0)
        for _, why in self.came.values():
            found[why] += 1
        return found

    def describe(self, began: float) -> dict[str, Any]:
        """For `timeline`: seconds after `began`, each list in order of time."""
        return {
            "pieces": self.pieces,
            "came": [[round(when - began, 4), piece, why] for piece, (when, why) in self.came.items()],
            "read": [[round(when - began, 4), piece] for piece, when in self.read.items()],
        }
