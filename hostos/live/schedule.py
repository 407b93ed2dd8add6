"""What is fetched although nobody waits for it yet, in which order, and how much at once.

    blocked reads  >  boot trace  >  read-ahead  >  the rest, while nothing else is to be done

Blocked reads are not queued here: they are asked for at once. But what has been asked for already is
on the wire before them, so the others keep to a window: large enough to keep the link full, and no
larger. It doubles as long as that makes pieces come faster.

Among others that are fetching the same image (`Neighbours`), a boot trace is not followed to the letter: what one of
them has already comes first, and else anything of the next few MB, so that each gets something else
from the seed, and has it to give.
"""

from __future__ import annotations

import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from hostos.errors import UserError
from hostos.live.journal import Why

WINDOW_LEAST, WINDOW_MOST = 256 * 1024, 16 * 1024 * 1024
"""Bytes asked for ahead. The least is 40 ms of 50 Mbit/s; the most keeps 600 Mbit/s at 200 ms full."""
FASTER, SLOWER = 1.2, 0.4
"""A window counts as better, or as too large, when the rate becomes that many times what it was."""
SPREAD = 4 * 1024 * 1024
"""Bytes of a boot trace out of which something is picked among others who fetch the same. More would be shared still
better, and delay what is read first."""
IDLE = 0.3
"""Seconds without a blocked read after which the rest may be fetched."""

# Milliseconds for libtorrent: it orders by them, and asks at once for what is due within a second.
DEADLINES: dict[Why, int] = {"demand": 0, "trace": 300, "ahead": 600, "rest": 900}


@dataclass(frozen=True)
class Rest:
    """Whether what nobody reads is fetched, too, and at how many bytes a second at most (0: no limit)."""

    fetch: bool = False
    rate: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Rest:
        """`off`, `on`, or bytes a second as `500k`, `2M`. Raises UserError."""
        if text in ("off", "on"):
            return cls(text == "on")
        if match := re.fullmatch(r"([1-9][0-9]{0,11})([kMG]?)", text):
            return cls(True, float(match[1]) * 1000 ** " kMG".index(match[2] or " "))
        raise UserError(f"not a way to fetch the rest: {text[:40]!r}", "write off, on, or bytes a second: 500k, 2M")


REST_OFF = Rest()


class Window:
    """How many bytes may be under way: grows like a TCP connection that starts, until it is of no use."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.size = WINDOW_LEAST
        self._best = 0.0
        self._round = 0
        self._began = clock()

    def restart(self) -> None:
        """The window was not full: what comes now says nothing about it."""
        self._round, self._began = 0, self._clock()

    def arrived(self, size: int) -> None:
        """`size` bytes came while the window was full."""
        self._round += size
        if self._round < self.size:
            return
        rate = self._round / max(self._clock() - self._began, 1e-6)
        self.restart()
        if rate > FASTER * self._best:
            self._best = rate
            self.size = min(2 * self.size, WINDOW_MOST)
        elif rate < SLOWER * self._best:
            self._best = rate / FASTER
            self.size = max(self.size // 2, WINDOW_LEAST)


@dataclass(frozen=True)
class Neighbours:
    """Peers that don't have everything yet either: which pieces each of them has."""

    pieces: Sequence[Sequence[bool]] = ()

    def have(self, piece: int) -> bool:
        """Whether one of them has it."""
        return any(each[piece] for each in self.pieces)


NOBODY = Neighbours()


class Schedule:
    """Asks for pieces that nobody waits for.

    `expected(piece)`: it is here, or being waited for; `ask(piece, milliseconds)`: have it fetched.
    """

    def __init__(
        self,
        pieces: int,
        piece_size: int,
        expected: Callable[[int], bool],
        ask: Callable[[int, int], None],
        clock: Callable[[], float] = time.monotonic,
        choose: Callable[[Sequence[int]], int] = random.choice,
    ) -> None:
        self.neighbours = NOBODY
        self._choose = choose
        self._pieces, self._piece_size = pieces, piece_size
        self._expected, self._ask, self._clock = expected, ask, clock
        self.window = Window(clock)
        self.asked: dict[int, Why] = {}
        self._rest = REST_OFF
        self._plans: list[deque[int]] = []
        self._ahead: deque[int] = deque()
        self._next_rest = 0
        self._rest_since: float | None = None
        self._rest_bytes = 0
        self._busy = clock()

    # --- what is wanted -----------------------------------------------------------------------------

    def replay(self, pieces: Iterable[int]) -> deque[int]:
        """Fetch these in this order; `drop` what is returned to leave off."""
        plan = deque(pieces)
        self._plans.append(plan)
        return plan

    def drop(self, plan: deque[int]) -> None:
        plan.clear()
        self._plans = [other for other in self._plans if other is not plan]

    def ahead(self, pieces: Iterable[int]) -> None:
        """Somebody reads in a row: replaces what was wanted for the row before."""
        self._ahead = deque(pieces)

    def fetch_rest(self, rest: Rest) -> None:
        """Whether to fetch everything in the end."""
        self._rest = rest

    def demanded(self, piece: int) -> Why | None:
        """Somebody waits for it now: why it had been asked for already, if it had."""
        self._busy = self._clock()
        return self.asked.pop(piece, None)

    # --- asking -------------------------------------------------------------------------------------

    def pump(self, *, waiting: bool) -> None:
        """Ask for as much as the window allows; `waiting`: somebody is blocked."""
        if waiting:
            self._busy = self._clock()
        room = self.window.size - len(self.asked) * self._piece_size
        while room > 0:
            found = self._next()
            if found is None:
                self.window.restart()
                return
            piece, why = found
            self.asked[piece] = why
            room -= self._piece_size
            self._ask(piece, DEADLINES[why])

    def arrived(self, piece: int) -> Why:
        """Why it was fetched. More may now be asked for: `pump`."""
        why = self.asked.pop(piece, "demand")
        if why != "rest":
            self.window.arrived(self._piece_size)
        return why

    @property
    def active(self) -> bool:
        """Whether there is something to be asked for, now or after a pause."""
        return bool(self.asked or self._ahead or any(self._plans) or self._left())

    def _left(self) -> bool:
        while self._next_rest < self._pieces and self._has(self._next_rest):
            self._next_rest += 1
        return self._rest.fetch and self._next_rest < self._pieces

    def _has(self, piece: int) -> bool:
        return piece in self.asked or self._expected(piece)

    def _next(self) -> tuple[int, Why] | None:
        for plan in self._plans:
            while plan:
                if not self._has(piece := self._next_of_plan(plan)):
                    return piece, "trace"
        while self._ahead:
            if not self._has(piece := self._ahead.popleft()):
                return piece, "ahead"
        return self._next_of_rest()

    def _next_of_plan(self, plan: deque[int]) -> int:
        """Takes it off the plan, which is not empty."""
        if not self.neighbours.pieces:
            return plan.popleft()
        while self._has(plan[0]) and len(plan) > 1:
            plan.popleft()
        near = list(islice(plan, max(SPREAD // self._piece_size, 1)))
        piece = next((each for each in near if self.neighbours.have(each)), None)
        if piece is None:
            piece = self._choose(near)
        plan.remove(piece)
        return piece

    def _next_of_rest(self) -> tuple[int, Why] | None:
        now = self._clock()
        if not self._rest.fetch or now - self._busy < IDLE:
            self._rest_since = None
            return None
        if self._rest_since is None:
            self._rest_since, self._rest_bytes = now, 0
        if self._rest.rate and self._rest_bytes > self._rest.rate * (now - self._rest_since):
            return None
        if not self._left():
            return None
        piece = self._next_rest
        self._rest_bytes += self._piece_size
        return piece, "rest"
