"""Where a layer's bytes come from, whatever the network behind it.

The FUSE file, statistics and deadlines are written against `BlockSource`; BitTorrent
(`torrent_source`) is one of them.
"""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class SourceError(OSError):
    """A read that could not be satisfied by its deadline; becomes EIO. The next read tries again."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EIO, why)


@dataclass
class SourceStats:
    """What a source has done since it was opened. Bytes and seconds.

    `verified`: bytes held and proved right; `downloaded`: payload received, duplicates and refused
    pieces included; `wasted`: the part of it that was of no use. `misses`: reads of
    something that was not here yet; `late`: pieces that somebody waited for although they were under
    way already. `prefetched`: pieces that came before anybody read them, by trace or read-ahead;
    `prefetch_used`: those of them that were read later.
    `stalls`: times nothing at all came for a while and other peers were tried; `errors`: reads that
    failed by their deadline.
    """

    size: int = 0
    verified: int = 0
    downloaded: int = 0
    uploaded: int = 0
    wasted: int = 0
    reads: int = 0
    read_bytes: int = 0
    misses: int = 0
    late: int = 0
    prefetched: int = 0
    prefetch_used: int = 0
    stalls: int = 0
    rebuilds: int = 0
    hash_failures: int = 0
    errors: int = 0
    last_error: str = ""
    peers: int = 0
    banned: int = 0
    wait_total: float = 0.0
    wait_median: float = 0.0
    wait_p95: float = 0.0
    wait_max: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class BlockSource(Protocol):
    """Verified ranges of one file."""

    @property
    def size(self) -> int: ...

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes (fewer only at the end of the file), verified.

        Waits until they are there; raises `SourceError` when the source's deadline passes first.
        """
        ...

    def stats(self) -> SourceStats: ...

    async def close(self) -> None: ...


class Waits:
    """Durations of the reads that had to wait: total, and quantiles of the last few thousand."""

    KEEP = 4096

    def __init__(self) -> None:
        self.total = 0.0
        self.longest = 0.0
        self._recent: list[float] = []

    def add(self, seconds: float) -> None:
        self.total += seconds
        self.longest = max(self.longest, seconds)
        self._recent.append(seconds)
        if len(self._recent) > 2 * self.KEEP:
            del self._recent[: self.KEEP]

    def into(self, stats: SourceStats) -> None:
        """Write them where they are told."""
        stats.wait_total, stats.wait_max = round(self.total, 4), round(self.longest, 4)
        stats.wait_median, stats.wait_p95 = round(self.quantile(0.5), 4), round(self.quantile(0.95), 4)

    def quantile(self, share: float) -> float:
        if not self._recent:
            return 0.0
        ordered = sorted(self._recent[-self.KEEP :])
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class ReadAhead:
    """How many pieces to ask for beyond the one being read.

    None for scattered reads (asking for more than is read costs the very bandwidth the reader
    waits for); 1, 2, 4 … `limit` while reads follow one another. A round trip decides what is worth
    more: booting a Debian without a trace over 50 Mbit/s took 6.4 s with a limit of 2 and 9.1 s with
    one of 64, but with round trips of 200 ms 72 s and 45 s.
    """

    LEAST, MOST = 2, 64
    PER_PIECE = 0.005
    """Seconds of a wait that are worth one piece."""

    def adapt(self, wait: float) -> None:
        """`wait`: seconds a read waited for something nobody had asked for before."""
        self._waits.append(wait)
        # The shortest of them: the others waited for other pieces, too.
        self.limit = max(self.LEAST, min(self.MOST, int(min(self._waits) / self.PER_PIECE)))

    def __init__(self, limit: int = LEAST) -> None:
        self.limit = limit
        self._expected = -1
        self._run = 0
        self._waits: deque[float] = deque(maxlen=32)

    def pieces(self, first: int, last: int) -> int:
        """Called with the pieces of each read; returns the number to prefetch after `last`."""
        if first in (self._expected, self._expected - 1):
            if last >= self._expected:
                self._run += 1
        else:
            self._run = 0
        self._expected = last + 1
        # Two reads in a row happen by accident all the time; three are a pattern.
        # Four times as many as are fetched ahead make a pattern whatever the round trip.
        limit = max(self.limit, min(self.MOST, self._run // 4)) if self.limit else 0
        return min(limit, 1 << min(self._run - 2, 30)) if self._run >= 2 else 0
