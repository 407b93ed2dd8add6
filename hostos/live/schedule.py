"""What is fetched although nobody waits for it yet, in which order, and how much at once.

    blocked reads  >  boot trace  >  read-ahead  >  the rest, while nothing else is to be done

Blocked reads are not queued here: they are asked for at once. But what has been asked for already is
on the wire before them, and before what other machines wait for, so the others keep to a window: large enough to
keep the link full, and no larger. It doubles as long as that makes pieces come faster, and not only later.

A peer that is far away is asked for more than that by libtorrent itself, out of a stock of what comes next, in the
order of their priorities.

Among others that are fetching the same (`hostos.live.neighbours`), a boot trace is not followed to the letter: all that
is for this machine to bring in is asked for, in order, and next to what is needed soon what one of the others has
already. What is for another to bring in is left to it, for a while even if somebody here waits for it, and what was
asked for is given back when the one turns up who is to bring it in.
"""

from __future__ import annotations

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
from hostos.live.window import Window

STOCK = (REQUESTS + 16) * 16 * 1024
"""Bytes of that stock: as many blocks as peers let be asked for at a time, and some."""
STEP = 384 * 1024
"""Bytes of the stock that have the same priority: the first are asked for first."""
SHARE = 16 * 1024 * 1024
"""Bytes of a boot trace that are divided among those who fetch the same: each asks for all of its part. As long as
some of it is left, libtorrent asks the seed, which has everything, for little that a neighbour could have sent."""
SOON = 1024 * 1024
"""Bytes of it in which what others have brought is asked for. It comes quickly."""
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
OWN_FIRST, OWN_NEXT = 4, 8
"""How many pieces of one's part have the highest priority of those ahead, and how many one less; the rest has two
less."""
BROUGHT = 3
"""The priority of what a neighbour has: lower than all of one's part, which only a seed has."""
GIVEN_BACK = 0
"""The priority of what is not to be asked for any more."""


@dataclass
class Asked:
    """A piece that has been asked for: why, when, and with which priority. `twice`: another is to bring it in, too."""

    why: Why
    since: float
    priority: int
    twice: bool = False


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
        self._neighbours = self._found = NOBODY
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
        self._order: dict[int, int] = {}
        """Of all pieces that were in a plan."""
        self._ahead: deque[int] = deque()
        self._next_rest = 0
        self._rest_since: float | None = None
        self._rest_bytes = 0
        self._busy = clock()

    # --- what is wanted -----------------------------------------------------------------------------

    def replay(self, pieces: Iterable[int]) -> deque[int]:
        """Fetch these in this order; `drop` what is returned to leave off."""
        plan = deque(pieces)
        for piece in plan:
            self._order.setdefault(piece, len(self._order))
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
        if found is not self._found:
            self._found = found
            self._rely()

    def _rely(self) -> None:
        self._neighbours = self._found.without(name for name, count in self._faults.items() if count >= FAULTS)
        if self._neighbours.crowd:
            self._divide()

    def left_to_others(self, piece: int) -> bool:
        """Whether somebody who waits for it may leave it to another machine for `PATIENCE` seconds."""
        return piece in self._order and not self._ours(piece)

    def let_down(self, piece: int) -> None:
        """It did not come from whom it was left to."""
        self._faults[self._neighbours.bringer(piece)] += 1
        self._rely()

    def _ours(self, piece: int) -> bool:
        """Whether it may be asked for although nobody waits: nobody else is to bring it in."""
        neighbours = self._neighbours
        return not neighbours.crowd or piece in neighbours.brought or neighbours.mine(piece)

    def _divide(self) -> None:
        """Others are known now, or have something more: ask for this machine's part, and give back what isn't."""
        brought, now = self._neighbours.brought, self._clock()
        soon = max(SOON // self._piece_size, 1)
        traced = [piece for piece, asked in self.asked.items() if asked.why == "trace"]
        back = [piece for piece in traced if not self._ours(piece) and not self.asked[piece].twice]
        for piece in back:
            del self.asked[piece]
            self._ask(piece, GIVEN_BACK)
        if self._plans:
            self._plans[0].extendleft(reversed(back))
        for plan in self._plans:
            head = [plan.popleft() for _ in range(min(len(plan), SHARE // self._piece_size))]
            head = [piece for piece in head if not self._has(piece)]
            for place, piece in enumerate(head):
                if self._ours(piece) and (place < soon or piece not in brought):
                    self.asked[piece] = Asked("trace", now, GIVEN_BACK)
            plan.extendleft(piece for piece in reversed(head) if piece not in self.asked)
        # All of them are asked for here, once their order is known.
        own = [piece for piece, asked in self.asked.items() if asked.why == "trace" and piece not in brought]
        own.sort(key=self._order.__getitem__)
        priorities = {piece: self._own_priority(place) for place, piece in enumerate(own)}
        for piece, asked in self.asked.items():
            if asked.why == "trace":
                self._prefer(piece, asked, priorities.get(piece, BROUGHT))

    @staticmethod
    def _own_priority(place: int) -> int:
        return PRIORITIES["trace"] - (place >= OWN_FIRST) - (place >= OWN_FIRST + OWN_NEXT)

    def _prefer(self, piece: int, asked: Asked, priority: int) -> None:
        if asked.priority != priority:
            asked.priority = priority
            self._ask(piece, priority)

    # --- asking -------------------------------------------------------------------------------------

    def pump(self, *, waiting: bool) -> None:
        """Ask for as much as the window allows; `waiting`: somebody is blocked."""
        if waiting:
            self._busy = self._clock()
        # (Among others, nothing is read ahead of what is not in the trace until one's part of it is here.)
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
            asked = Asked(why, self._clock(), self._priority(len(self.asked), why), twice=not self._ours(piece))
            self.asked[piece] = asked
            room -= self._piece_size
            self._ask(piece, asked.priority)

    @property
    def _stocking(self) -> bool:
        return self.window.far and not self._neighbours.crowd

    @property
    def _most(self) -> int:
        """Bytes that may be asked for at a time."""
        return max(self.window.size, STOCK) if self._stocking else self.window.size

    def _priority(self, place: int, why: Why) -> int:
        """The priority of the piece that is asked for in that place."""
        if why == "rest" or not self._stocking:
            return PRIORITIES[why]
        return max(PRIORITIES[why] - place * self._piece_size // STEP, LEAST_AHEAD)

    def _promote(self) -> None:
        """Give what has moved up the priority of its place."""
        if self._came * self._piece_size < STEP // 2 or not self._stocking:
            return
        self._came = 0
        for place, (piece, asked) in enumerate(self.asked.items()):
            self._prefer(piece, asked, self._priority(place, asked.why))

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
            if not self._has(piece := self._ahead.popleft()) and self._ours(piece):
                return piece, "ahead"
        return self._next_of_rest()

    def _next_of_plan(self, plan: deque[int]) -> int | None:
        """Takes it off the plan; None if there is nothing, or nothing to be done here."""
        while plan and self._has(plan[0]):
            plan.popleft()
        if not plan:
            return None
        if not self._neighbours.crowd:
            return plan.popleft()
        if self.asked or self._clock() - self._last < STEAL:
            return None
        # All the rest is for others to bring in. Better twice than never.
        piece = self._choose(list(islice(plan, max(SOON // self._piece_size, 1))))
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
