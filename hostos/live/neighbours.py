"""Peers that are fetching the same content at the same time, and how the work is divided among them.

Several machines that start together want the same blocks in the same order, and if each asks the one seed for all of
them, each waits for the seed to send everything as often as there are machines. So each piece has one of them to
bring it in, from whom the others have it then. Who that is needs no talk: rendezvous hashing (Thaler and Ravishankar,
1998) over the peer IDs, which all of them know, tells everybody the same, and nearly so if they don't all know each
other.

Nobody is relied upon who does not fetch anything, or has several times not brought in what was waited for
(`hostos.live.schedule`).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import compress, count

BUSY, NEW = 2.5, 0.6
"""Seconds since a neighbour last got something for which it counts as fetching, and since it was first seen."""


@dataclass(frozen=True)
class Neighbour:
    """`name`: its peer ID; `pieces`: for each piece, whether it has it; `busy`: whether it is fetching."""

    name: bytes
    pieces: Sequence[bool]
    busy: bool = True


@dataclass(frozen=True)
class Neighbours:
    """`me`: our own peer ID; `others`: all peers that lack something."""

    me: bytes = b""
    others: tuple[Neighbour, ...] = ()

    @cached_property
    def brought(self) -> frozenset[int]:
        """Pieces that one of the others has."""
        return frozenset(piece for each in self.others for piece in compress(count(), each.pieces))

    def bringer(self, piece: int) -> bytes:
        """Who is to bring the piece in, of those who fetch."""
        return _highest((self.me, *(each.name for each in self.others if each.busy)), piece)

    @cached_property
    def crowd(self) -> bool:
        """Whether anybody else is fetching."""
        return any(each.busy for each in self.others)

    def mine(self, piece: int) -> bool:
        """Whether this machine is to bring it in."""
        return piece not in self.brought and self.bringer(piece) == self.me

    def without(self, names: Iterable[bytes]) -> Neighbours:
        """The same; those named are not relied upon."""
        unreliable = frozenset(names)
        if not unreliable:
            return self
        others = tuple(replace(each, busy=each.busy and each.name not in unreliable) for each in self.others)
        return replace(self, others=others)


@lru_cache(maxsize=1 << 16)
def _highest(names: tuple[bytes, ...], piece: int) -> bytes:
    return max(names, key=lambda name: (zlib.crc32(b"%d" % piece, zlib.crc32(name)), name))


NOBODY = Neighbours()


class Watch:
    """Which of the neighbours are fetching: those whose number of pieces grows."""

    def __init__(self, me: bytes, clock: Callable[[], float] = time.monotonic) -> None:
        self._me, self._clock = me, clock
        self._seen: dict[bytes, tuple[int, float, float]] = {}
        """By name: how many pieces, since when, and for how long it then counts as fetching."""

    def look(self, peers: Iterable[tuple[bytes, Sequence[bool]]]) -> Neighbours:
        """`peers`: name and pieces of each that lacks something."""
        now = self._clock()
        seen, others = {}, []
        for name, pieces in peers:
            number = sum(pieces)
            before, since, counts = self._seen.get(name, (number, now, NEW))
            if number != before:
                since, counts = now, BUSY
            seen[name] = number, since, counts
            others.append(Neighbour(name, pieces, now - since < counts))
        self._seen = seen
        return Neighbours(self._me, tuple(others))
