"""What is fetched although nobody waits for it yet, in which order, and how much at once.

    blocked reads  >  boot trace  >  read-ahead  >  the rest, while nothing else is to be done

Blocked reads are not queued here: they are asked for at once. But what has been asked for already is
on the wire before them, and before what other machines wait for, so the others keep to a window: large enough to
keep the link full, and no larger. It doubles as long as that makes pieces come faster, and not only later.

A peer that is far away is asked for more than that by libtorrent itself, out of a stock of what comes next, in the
order of their priorities.

Among others that are fetching the same (`hostos.live.neighbours`), a boot trace is not followed to the letter: of its
next few MB, what one of them has already is asked for, and what is for this machine to bring in. What is for
another to bring in is left to it, for a while even if somebody here waits for it.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from hostos.errors import UserError
from hostos.live.journal import Why
from hostos.live.neighbours import NOBODY, Neighbours
from hostos.live.swarm_settings import REQUESTS

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
STOCK = (REQUESTS + 16) * 16 * 1024
"""Bytes of that stock: as many blocks as peers let be asked for at a time, and some."""
STEP = 384 * 1024
"""Bytes of the stock that have the same priority: the first are asked for first."""
FORGET = 20.0
"""Seconds after which the quickest no longer counts: the path may have changed."""
SPREAD = 4 * 1024 * 1024
"""Bytes of a boot trace out of which something is picked among others who fetch the same. More would be shared still
better, and delay what is read first."""
PATIENCE = 1.0
"""Seconds for which somebody may wait for what another machine is to bring in before it is asked for here."""
FAULTS = 3
"""How often another machine may have been waited for in vain and still be relied upon."""
STEAL = 0.3
"""Seconds without a piece after which what others are to bring in is asked for, if there is nothing else."""
IDLE = 0.3
"""Seconds without a blocked read after which the rest may be fetched."""

PRIORITIES: dict[Why, int] = {"demand": 7, "trace": 6, "ahead": 6, "rest": 1}
"""libtorrent's, from 1 to 7: what it asks a peer for next is of the highest. Those of trace and read-ahead are for what
comes first in a stock."""
LEAST_AHEAD = 2
"""The priority of the end of a stock."""


@dataclass
class Asked:
    """A piece that has been asked for: why, when, and with which priority."""

    why: Why
    since: float
    priority: int


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


class Schedule:
    """Asks for pieces that nobody waits for.

    `expected(piece)`: it is here, or being waited for; `ask(piece, priority)`: have it fetched.
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
        self._neighbours = NOBODY
        self._faults: Counter[bytes] = Counter()
        self._last = clock()
        self._choose = choose
        self._pieces, self._piece_size = pieces, piece_size
        self._expected, self._ask, self._clock = expected, ask, clock
        self.window = Window(clock)
        self.asked: dict[int, Asked] = {}
        self._came = 0
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
        return asked.why if (asked := self.asked.pop(piece, None)) else None

    # --- among others -------------------------------------------------------------------------------

    @property
    def neighbours(self) -> Neighbours:
        return self._neighbours

    @neighbours.setter
    def neighbours(self, found: Neighbours) -> None:
        self._neighbours = found.without(name for name, count in self._faults.items() if count >= FAULTS)

    def left_to_others(self, piece: int) -> bool:
        """Whether somebody who waits for it may leave it to another machine for `PATIENCE` seconds."""
        neighbours = self._neighbours
        return (
            bool(neighbours.others)
            and any(piece in plan for plan in self._plans)
            and not neighbours.have(piece)
            and neighbours.bringer(piece) != neighbours.me
        )

    def let_down(self, piece: int) -> None:
        """It did not come from whom it was left to."""
        self._faults[self._neighbours.bringer(piece)] += 1
        self.neighbours = self._neighbours

    # --- asking -------------------------------------------------------------------------------------

    def pump(self, *, waiting: bool) -> None:
        """Ask for as much as the window allows; `waiting`: somebody is blocked."""
        if waiting:
            self._busy = self._clock()
        room = self._most - len(self.asked) * self._piece_size
        if not self.asked:
            self.window.restart()
        self._promote()
        while room > 0:
            found = self._next()
            if found is None:
                self.window.restart()
                return
            piece, why = found
            asked = Asked(why, self._clock(), self._priority(len(self.asked), piece, why))
            self.asked[piece] = asked
            room -= self._piece_size
            self._ask(piece, asked.priority)

    @property
    def _stocking(self) -> bool:
        return self.window.far and not self._neighbours.others

    @property
    def _most(self) -> int:
        """Bytes that may be asked for at a time."""
        if self._neighbours.others:
            # What is for this machine to bring in is wanted by all the others; the plan is not looked at further on.
            return max(self.window.size, SPREAD)
        return max(self.window.size, STOCK) if self._stocking else self.window.size

    def _priority(self, place: int, piece: int, why: Why) -> int:
        """The priority of the piece that is asked for in that place."""
        if self._neighbours.others and why == "trace":
            # So the seed, which has all of them, is asked first for what only it has.
            return PRIORITIES[why] - self._neighbours.have(piece)
        if why == "rest" or not self._stocking:
            return PRIORITIES[why]
        return max(PRIORITIES[why] - place * self._piece_size // STEP, LEAST_AHEAD)

    def _promote(self) -> None:
        """Give what has moved up the priority of its place."""
        if self._came * self._piece_size < STEP // 2 or not self._stocking:
            return
        self._came = 0
        for place, (piece, asked) in enumerate(self.asked.items()):
            priority = self._priority(place, piece, asked.why)
            if asked.priority != priority:
                asked.priority = priority
                self._ask(piece, priority)

    def arrived(self, piece: int) -> Why:
        """Why it was fetched. More may now be asked for: `pump`."""
        asked = self.asked.pop(piece, None)
        self._came += 1
        self._last = self._clock()
        if asked is None or asked.why != "rest":
            self.window.arrived(self._piece_size, self._last - asked.since if asked else None)
        return asked.why if asked else "demand"

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
            if (piece := self._next_of_plan(plan)) is not None:
                return piece, "trace"
        while self._ahead:
            if not self._has(piece := self._ahead.popleft()):
                return piece, "ahead"
        return self._next_of_rest()

    def _next_of_plan(self, plan: deque[int]) -> int | None:
        """Takes it off the plan; None if there is nothing, or nothing to be done here."""
        while plan and self._has(plan[0]):
            plan.popleft()
        if not plan:
            return None
        neighbours = self._neighbours
        if not neighbours.others:
            return plan.popleft()
        near = [piece for piece in islice(plan, max(SPREAD // self._piece_size, 1)) if not self._has(piece)]
        me = neighbours.me
        piece = next((each for each in near if neighbours.have(each) or neighbours.bringer(each) == me), None)
        if piece is None and not self.asked and self._clock() - self._last > STEAL:
            # Better twice than never.
            piece = self._choose(near)
        if piece is not None:
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
