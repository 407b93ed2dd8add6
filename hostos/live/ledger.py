"""Who sent what: which peers to use next, which to distrust, which never to ask again.

libtorrent cannot tell who spoiled a piece that several peers contributed to, puts all of them on
parole and then may stop asking anyone (docs/live-boot.md, "A peer that lies"). So blame is kept
here, and acted upon by rebuilding the torrent with the sources this ledger names.

Peers are endpoints, never addresses: behind user-mode networking every guest looks like one host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

Endpoint = tuple[str, int]

BAN_SECONDS = 600.0
SUSPECT_SECONDS = 120.0
CLEARED_AFTER = 16
"""Good pieces in a row from one source alone that clear it of suspicion."""


class Ledger:
    """Suspicion and bans of the peers of one torrent.

    A peer is banned only when it alone made a piece that failed. Contributors of a mixed piece are
    suspected: from then on one source is used at a time (`careful`), so that the next failure has
    one author. A good peer can be suspected, and is cleared by serving well; it is never banned.
    """

    def __init__(self, peers: Iterable[Endpoint] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._peers: dict[Endpoint, None] = dict.fromkeys(peers)
        self._banned: dict[Endpoint, float] = {}
        self._suspicion: dict[Endpoint, tuple[int, float]] = {}
        self._streak: dict[Endpoint, int] = {}
        self.careful = False

    def add(self, peer: Endpoint) -> None:
        self._peers.setdefault(peer)

    @property
    def peers(self) -> tuple[Endpoint, ...]:
        return tuple(self._peers)

    def banned(self, peer: Endpoint) -> bool:
        until = self._banned.get(peer)
        if until is not None and self._clock() >= until:
            del self._banned[peer]
            return False
        return until is not None

    @property
    def bans(self) -> tuple[Endpoint, ...]:
        return tuple(peer for peer in tuple(self._banned) if self.banned(peer))

    def suspicion(self, peer: Endpoint) -> int:
        count, until = self._suspicion.get(peer, (0, 0.0))
        return count if self._clock() < until else 0

    def failed(self, contributors: Iterable[Endpoint]) -> None:
        """A piece made by these peers did not have its hash."""
        authors = set(contributors)
        self.careful = True
        for peer in authors:
            self._streak[peer] = 0
        if len(authors) == 1:
            self._banned[authors.pop()] = self._clock() + BAN_SECONDS
        else:
            for peer in authors:
                self._suspect(peer)

    def stalled(self, peer: Endpoint) -> None:
        """Nothing came from the only source for a while."""
        self._streak[peer] = 0
        self._suspect(peer)

    def good(self, contributors: Iterable[Endpoint]) -> None:
        """A piece made by these peers was right. Proof only if there was one author."""
        authors = set(contributors)
        if len(authors) != 1:
            return
        peer = authors.pop()
        self._streak[peer] = self._streak.get(peer, 0) + 1
        if self._streak[peer] >= CLEARED_AFTER:
            self._suspicion.pop(peer, None)
            self.careful = False

    def sources(self) -> tuple[Endpoint, ...]:
        """Whom to ask from now on: everybody trusted, or while `careful` the least suspected one.

        Empty only if every known peer is banned.
        """
        usable = [peer for peer in self._peers if not self.banned(peer)]
        usable.sort(key=self.suspicion)  # stable: ties stay in the order they became known
        if self.careful:
            return tuple(usable[:1])
        trusted = tuple(peer for peer in usable if not self.suspicion(peer))
        return trusted or tuple(usable)

    def _suspect(self, peer: Endpoint) -> None:
        self._suspicion[peer] = (self.suspicion(peer) + 1, self._clock() + SUSPECT_SECONDS)
