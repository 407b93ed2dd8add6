"""The boot trace's format (from strangers), and what is fetched ahead of whom."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.live.journal import Journal
from hostos.live.neighbours import BUSY, NEW, NOBODY, Neighbour, Neighbours, Watch
from hostos.live.schedule import (
    BROUGHT,
    FAULTS,
    GIVEN_BACK,
    LEAST_AHEAD,
    OWN_FIRST,
    PRIORITIES,
    SHARE,
    SOON,
    STEAL,
    STOCK,
    Rest,
    Schedule,
)
from hostos.live.trace import MAX_TRACE, Range, Trace, Workload, pieces
from hostos.live.window import WINDOW_FIRST, WINDOW_LEAST, WINDOW_MOST, Window

SIZES = (1_000_000, 50_000)
PIECE = 65536


def text(**changes: Any) -> bytes:
    workload = {"command": ["sh"], "blocks": [[0, 0, 3], [1, 2, 1]]}
    return json.dumps({"schema": 1, "kind": "hostos-trace", "workloads": [workload], **changes}).encode()


ranges = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(1, 1)).map(lambda numbers: Range(*numbers)), max_size=20
)
workloads = st.builds(
    Workload, st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"))).map(tuple), ranges.map(tuple)
)


@settings(deadline=None)
@given(st.lists(workloads, min_size=1, max_size=16))
def test_a_trace_is_read_back(made: list[Workload]) -> None:
    trace = Trace(tuple(made))
    assert Trace.parse(trace.to_json(), SIZES) == trace


BAD = [
    b"",
    b"\xff",
    b"[]",
    b"{}",
    b"[" * 100_000,
    text(schema=2),
    text(schema=True),
    text(kind="other"),
    text(extra=1),
    text(workloads=[]),
    text(workloads=[{}]),
    text(workloads=[{"command": [], "blocks": []}] * 17),
    text(workloads=[{"command": "sh", "blocks": []}]),
    text(workloads=[{"command": ["a\0"], "blocks": []}]),
    text(workloads=[{"command": ["\ud800"], "blocks": []}]),
    text(workloads=[{"command": ["x" * 70_000], "blocks": []}]),
    *(
        text(workloads=[{"command": [], "blocks": [item]}])
        for item in (
            [0, 0], [0, 0, 0], [0, -1, 2], [2, 0, 1], [-1, 0, 1], [0, 60, 3], [1, 4, 1], [0, 1 << 70, 1],
            [0, 0, 1 << 70], [0, 0.0, 1], [0, True, 1], "abc", None, [0, 0, 1, 1],
        )
    ),
    text(workloads=[{"command": [], "blocks": [[0, 0, 1]] * 65537}]),
    b" " * (MAX_TRACE + 1),
    text()[:-1] + b',"kind":"hostos-trace"}',
]  # fmt: skip


@pytest.mark.parametrize("data", BAD)
def test_a_malformed_trace_is_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="boot trace"):
        Trace.parse(data, SIZES)


@settings(deadline=None)
@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
    lambda value: json.dumps({"schema": 1, "kind": "hostos-trace", "workloads": value}).encode()
))  # fmt: skip
def test_any_input_is_parsed_or_refused(data: bytes) -> None:
    with suppress(UserError):
        assert isinstance(Trace.parse(data, SIZES), Trace)


def test_which_workload_is_replayed() -> None:
    python = Workload(("python3", "-c", "1"), (Range(0, 0, 2), Range(0, 9, 1)))
    server = Workload(("/usr/sbin/nginx",), (Range(0, 1, 1), Range(0, 5, 1), Range(0, 9, 1)))
    init = Workload((), (Range(0, 7, 1),))
    trace = Trace((python, server, init))
    assert trace.plan(("python3", "-c", "1")) == python.ranges
    assert trace.plan(("/usr/bin/python3", "-c", "2")) == python.ranges
    assert trace.plan(("nginx", "-t")) == server.ranges
    assert trace.plan(()) == init.ranges
    assert trace.plan(("perl",)) == ()
    assert Trace((python, server)).plan(("perl",)) == (Range(0, 1, 1), Range(0, 9, 1))
    assert Trace((python,)).plan(("perl",)) == ()


def test_blocks_become_pieces_once_and_in_order() -> None:
    found = (Range(0, 9, 1), Range(1, 0, 1), Range(0, 3, 2), Range(0, 8, 1))
    assert pieces(found, 0, PIECE) == [2, 0, 1]
    assert pieces(found, 1, PIECE) == [0]
    assert pieces(found, 0, 16384) == [9, 3, 4, 8]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Asked:
    """A schedule over pieces that never come by themselves."""

    def __init__(self, count: int = 1000) -> None:
        self.clock = Clock()
        self.here: set[int] = set()
        self.asked: list[int] = []
        self.priorities: dict[int, int] = {}
        self.schedule = Schedule(count, PIECE, self.here.__contains__, self.ask, self.clock, max)

    def ask(self, piece: int, priority: int) -> None:
        if piece not in self.priorities:
            self.asked.append(piece)
        self.priorities[piece] = priority

    def come(self, piece: int, after: float = 0.0) -> str:
        self.clock.now += after
        self.here.add(piece)
        why = self.schedule.arrived(piece)
        self.schedule.pump(waiting=False)
        return why


def test_the_trace_is_asked_for_in_order_and_never_more_than_the_window() -> None:
    made = Asked()
    made.schedule.replay(range(100, 200))
    made.schedule.pump(waiting=True)
    assert made.asked == [100, 101]
    assert made.come(101, 0.01) == "trace"
    assert made.asked == [100, 101, 102]
    made.schedule.pump(waiting=True)
    assert len(made.asked) == 3
    assert set(made.priorities.values()) == {PRIORITIES["trace"]}


def test_of_who_is_far_away_a_stock_is_asked_for_in_its_order() -> None:
    made = Asked()
    made.schedule.replay(range(1000))
    made.schedule.pump(waiting=True)
    # 50 ms from the first request to its answer, of which the link takes 10.
    made.come(0, 0.05)
    made.come(1, 0.01)
    assert made.schedule.window.far
    assert made.asked == list(range(2 + STOCK // PIECE))
    order = [made.priorities[piece] for piece in made.asked[2:]]
    assert order == sorted(order, reverse=True)
    assert order[0] == PRIORITIES["trace"]
    assert order[-1] == LEAST_AHEAD
    # What moves up gets the priority of its place.
    made.clock.now += 0.05
    for piece in range(2, 20):
        made.come(piece, 0.01)
    order = [made.priorities[piece] for piece in made.asked if piece not in made.here]
    assert order == sorted(order, reverse=True)
    assert order[0] == PRIORITIES["trace"]


def having(*pieces: int) -> list[bool]:
    return [piece in pieces for piece in range(1000)]


def beside(*others: list[bool], busy: bool = True) -> Neighbours:
    """Others that have these pieces."""
    return Neighbours(b"me", tuple(Neighbour(b"other %d" % number, each, busy) for number, each in enumerate(others)))


def test_among_others_all_of_our_part_is_asked_for_and_soon_what_they_have() -> None:
    made = Asked()
    made.schedule.replay(range(100, 900))
    soon, share = 100 + SOON // PIECE, 100 + SHARE // PIECE
    neighbours = beside(having(0, 110, soon, 250), having(103))
    made.schedule.neighbours = neighbours
    ours = set(made.asked) - {103, 110}
    assert ours == {piece for piece in range(100, share) if neighbours.mine(piece)}
    assert not ours & {soon, 250}
    # So that the seed is asked for what only it has, and first for what comes first.
    assert made.priorities[103] == made.priorities[110] == BROUGHT < min(made.priorities[piece] for piece in ours)
    assert [made.priorities[piece] for piece in sorted(ours)] == sorted(
        (made.priorities[p] for p in ours), reverse=True
    )
    assert sum(made.priorities[piece] == PRIORITIES["trace"] for piece in ours) == OWN_FIRST
    # What has been brought meanwhile comes from there; what was far away is near some time.
    first = min(ours)
    for piece in range(100, 110):
        made.here.add(piece)
    made.schedule.neighbours = beside(having(0, 110, soon, 250, first), having(103, max(ours)))
    assert made.priorities[max(ours)] == BROUGHT
    assert made.priorities[soon] == BROUGHT
    assert 250 not in made.asked


def test_a_crowd_has_the_seed_send_everything_about_once() -> None:
    names = [b"-HO0100-%012d" % number for number in range(5)]
    crowd = dict(zip(names, (Asked() for _ in names), strict=True))
    plan, sent = range(100, 300), 0
    for each in crowd.values():
        each.schedule.replay(plan)
    while not all(each.here >= set(plan) for each in crowd.values()):
        had = {name: having(*each.here) for name, each in crowd.items()}
        for name, each in crowd.items():
            each.clock.now += 0.05
            others = tuple(Neighbour(other, had[other]) for other in names if other != name)
            each.schedule.neighbours = found = Neighbours(name, others)
            each.schedule.pump(waiting=True)
            wanted = [piece for piece in each.priorities if each.priorities[piece] and piece not in each.here]
            # Neighbours are quick; the seed sends to everybody in turn, first what has the highest priority.
            for piece in [piece for piece in wanted if piece in found.brought][:4]:
                each.come(piece)
            if only_seed := [piece for piece in wanted if piece not in found.brought]:
                each.come(max(only_seed, key=each.priorities.__getitem__))
                sent += 1
    assert sent < 1.05 * len(plan)


def test_what_was_asked_for_is_given_back_when_its_bringer_turns_up() -> None:
    made = Asked()
    made.schedule.replay(range(100))
    made.schedule.neighbours = beside(having())
    two = {piece for piece in made.asked if made.priorities[piece] != GIVEN_BACK}
    made.schedule.neighbours = three = beside(having(), having())
    assert {piece for piece in two if made.priorities[piece] != GIVEN_BACK} == {
        piece for piece in two if three.mine(piece)
    }
    # Those are not forgotten: alone again, they come in their order.
    made.schedule.neighbours = NOBODY
    for piece in [each for each in made.asked if made.priorities[each] != GIVEN_BACK]:
        made.come(piece)
    assert set(made.asked) >= set(range(8))


def test_read_ahead_is_shared_too() -> None:
    made = Asked()
    made.schedule.neighbours = neighbours = beside(having(5), having())
    made.schedule.ahead(range(20))
    made.schedule.pump(waiting=True)
    for piece in made.asked:
        made.come(piece)
    assert set(made.asked) == {piece for piece in range(20) if neighbours.mine(piece) or piece == 5}


def test_each_piece_has_one_bringer_whoever_is_asked() -> None:
    names = [b"-HO0100-%012d" % number for number in range(3)]
    views = [Neighbours(name, tuple(Neighbour(other, having()) for other in names if other != name)) for name in names]
    shares = dict.fromkeys(names, 0)
    for piece in range(300):
        (bringer,) = {view.bringer(piece) for view in views}
        shares[bringer] += 1
    assert all(60 < share < 140 for share in shares.values())


def test_who_fetches_nothing_brings_nothing_in() -> None:
    assert {beside(having(), having(), busy=False).bringer(piece) for piece in range(50)} == {b"me"}
    watch = Watch(b"me", clock := Clock())
    assert watch.look([(b"a", having(1)), (b"b", having(1))]).others[0].busy
    clock.now += NEW + 0.1
    idle, fetching = (found := watch.look([(b"a", having(1)), (b"b", having(1, 2))])).others
    assert (idle.busy, fetching.busy, found.crowd) == (False, True, True)
    clock.now += NEW + 0.1
    assert watch.look([(b"b", having(1, 2))]).crowd
    clock.now += BUSY
    assert not watch.look([(b"b", having(1, 2))]).crowd


def test_beside_those_who_fetch_nothing_it_is_as_alone() -> None:
    made, alone = Asked(), Asked()
    for each in (made, alone):
        each.schedule.replay(range(100))
    made.schedule.neighbours = beside(having(3), having(), busy=False)
    for each in (made, alone):
        each.schedule.pump(waiting=True)
    assert made.asked == alone.asked
    assert not made.schedule.left_to_others(50)


def test_what_somebody_waits_for_is_left_to_its_bringer_once() -> None:
    made = Asked()
    made.schedule.replay(range(100))
    neighbours = beside(having(7))
    made.schedule.neighbours = neighbours
    theirs = [piece for piece in range(100) if neighbours.bringer(piece) != b"me"]
    assert made.schedule.left_to_others(theirs[0])
    assert not made.schedule.left_to_others(7)  # it is there
    assert not made.schedule.left_to_others(500)  # nobody fetches it ahead
    for _ in range(FAULTS):
        assert made.schedule.left_to_others(theirs[0])
        made.schedule.let_down(theirs[0])
    assert not any(made.schedule.left_to_others(piece) for piece in theirs)
    made.schedule.neighbours = neighbours
    assert not any(made.schedule.left_to_others(piece) for piece in theirs)


def test_what_others_are_to_bring_in_is_asked_for_when_nothing_else_is_left() -> None:
    made = Asked()
    made.schedule.replay(range(4))
    made.schedule.neighbours = neighbours = beside(having())
    made.schedule.pump(waiting=True)
    ours = [piece for piece in range(4) if neighbours.bringer(piece) == b"me"]
    assert 0 < len(ours) < 4
    assert made.asked == ours
    for piece in ours:
        made.come(piece)
    assert made.asked == ours
    made.clock.now += STEAL + 0.1
    made.schedule.pump(waiting=True)
    assert len(made.asked) == len(ours) + 1


def test_among_others_everything_is_asked_for_once_in_the_end() -> None:
    made = Asked()
    made.here.update(range(100, 120))
    made.schedule.replay([*range(100, 200), *range(90, 110)])
    made.schedule.neighbours = beside(having(*range(0, 1000, 3)))
    for _ in range(100):
        made.clock.now += STEAL + 0.1
        made.schedule.pump(waiting=True)
        for piece in made.asked:
            if piece not in made.here:
                made.come(piece)
    assert sorted(made.asked) == [*range(90, 100), *range(120, 200)]


def test_the_trace_goes_before_read_ahead_and_that_before_the_rest() -> None:
    made = Asked(8)
    made.clock.now = 10.0
    made.schedule.fetch_rest(Rest(True))
    made.schedule.ahead([5])
    made.schedule.replay([7])
    made.schedule.pump(waiting=False)
    made.come(7)
    assert made.asked[:3] == [7, 5, 0]


def test_the_rest_waits_until_nobody_has_waited_for_a_while() -> None:
    made = Asked()
    made.schedule.fetch_rest(Rest(True))
    made.schedule.pump(waiting=True)
    made.schedule.pump(waiting=False)
    assert made.asked == []
    made.clock.now += 0.5
    made.schedule.pump(waiting=False)
    assert made.asked == [0, 1]
    made.schedule.demanded(77)
    made.come(0)
    assert made.asked == [0, 1]


def test_the_rest_keeps_its_rate() -> None:
    made = Asked()
    made.clock.now = 10.0
    made.schedule.fetch_rest(Rest.parse("100k"))
    for _ in range(1000):
        made.clock.now += 0.01
        made.schedule.pump(waiting=False)
        for piece in set(made.asked) - made.here:
            made.come(piece)
    assert 900_000 < len(made.here) * PIECE < 1_200_000


def test_what_is_here_or_on_its_way_is_not_asked_for_again() -> None:
    made = Asked(10)
    made.here.update({1, 2})
    made.schedule.replay([0, 1, 2, 3])
    made.schedule.replay([3, 0, 4])
    made.schedule.pump(waiting=False)
    assert made.asked == [0, 3]
    made.come(0)
    assert made.asked[:3] == [0, 3, 4]
    assert made.schedule.demanded(3) == "trace"
    assert made.schedule.demanded(3) is None


def test_nothing_is_fetched_for_who_has_gone() -> None:
    made = Asked()
    plan = made.schedule.replay(range(50))
    made.schedule.pump(waiting=False)
    made.schedule.drop(plan)
    for piece in (0, 1):
        made.come(piece)
    assert made.asked == [0, 1]
    assert not made.schedule.active


def deliver(window: Window, clock: Clock, rate: float, round_trip: float, seconds: float) -> None:
    """A link of this rate and round trip that is kept full as far as the window goes."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now += max(PIECE / rate, round_trip * PIECE / window.size)
        window.arrived(PIECE)


@pytest.mark.parametrize(("rate", "round_trip"), [(6.25e6, 0.04), (6.25e6, 0.2), (12.5e6, 0.2), (2.5e6, 0.0)])
def test_the_window_keeps_the_link_full_and_is_not_much_larger(rate: float, round_trip: float) -> None:
    clock = Clock()
    window = Window(clock)
    deliver(window, clock, rate, round_trip, 10.0)
    assert window.size >= 0.85 * rate * round_trip
    assert WINDOW_LEAST <= window.size <= max(4 * rate * round_trip, 2 * WINDOW_FIRST)
    assert window.size <= WINDOW_MOST


def test_the_window_shrinks_when_the_link_does() -> None:
    clock = Clock()
    window = Window(clock)
    deliver(window, clock, 12.5e6, 0.2, 10.0)
    large = window.size
    deliver(window, clock, 0.6e6, 0.02, 30.0)
    assert window.size < large


@pytest.mark.parametrize(
    ("words", "rest"),
    [("off", Rest()), ("on", Rest(True)), ("500k", Rest(True, 5e5)), ("2M", Rest(True, 2e6)), ("7", Rest(True, 7.0))],
)
def test_how_the_rest_is_told(words: str, rest: Rest) -> None:
    assert Rest.parse(words) == rest


@pytest.mark.parametrize("words", ["", "yes", "-1", "0", "1.5M", "2MB"])
def test_how_the_rest_is_not_told(words: str) -> None:
    with pytest.raises(UserError, match="the rest"):
        Rest.parse(words)


def test_the_journal_tells_hits_from_misses() -> None:
    clock = Clock()
    journal = Journal(10, clock=clock)
    journal.arrived(1, "trace")
    journal.arrived(2, "ahead")
    clock.now = 1.0
    journal.reading(100, 50, 1, 1)
    journal.reading(100, 50, 1, 1)
    journal.reading(9000, 10, 3, 3)
    journal.arrived(3, "demand")
    assert journal.used == 1
    assert journal.counts() == {"demand": 1, "trace": 1, "ahead": 1, "rest": 0}
    assert journal.describe(0.5)["read"] == [[0.5, 1], [0.5, 3]]
    assert journal.reads == []


def test_reads_are_noted_when_they_touch_something_new() -> None:
    journal = Journal(10, clock=Clock())
    journal.watch()
    for offset, length in ((0, 4096), (100, 10), (4000, 200), (4096, 1)):
        journal.reading(offset, length, 0, 0)
    assert journal.reads == [(0.0, 0, 4096), (0.0, 4000, 200)]


def test_reads_of_one_page_through_a_loop_device_are_told_apart() -> None:
    journal = Journal(10, clock=Clock())
    journal.watch()
    for offset in (8192, 9216, 8192):
        journal.reading(offset, 1024, 0, 0)
    assert journal.reads == [(0.0, 8192, 1024), (0.0, 9216, 1024)]
