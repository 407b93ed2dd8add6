"""Blame: the guilty are banned, the innocent never."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hostos.live.ledger import BAN_SECONDS, CLEARED_AFTER, SUSPECT_SECONDS, Endpoint, Ledger

A, B, C = ("10.0.2.2", 1), ("10.0.2.2", 2), ("10.0.2.2", 3)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_single_author_is_banned_and_the_ban_expires() -> None:
    clock = Clock()
    ledger = Ledger([A, B], clock)
    ledger.failed([A])
    assert ledger.banned(A)
    assert ledger.bans == (A,)
    assert ledger.sources() == (B,)
    clock.now = BAN_SECONDS
    assert not ledger.banned(A)


def test_mixed_piece_bans_nobody_and_leads_to_one_source() -> None:
    ledger = Ledger([A, B, C])
    ledger.failed([A, B])
    assert ledger.bans == ()
    assert ledger.careful
    assert ledger.sources() == (C,)


def test_peers_behind_one_address_are_told_apart() -> None:
    ledger = Ledger([A, B])
    ledger.failed([B])
    assert ledger.sources() == (A,)


def test_good_source_clears_itself_and_the_suspect_waits() -> None:
    clock = Clock()
    ledger = Ledger([A, B, C], clock)
    ledger.failed([A, B])
    for _ in range(CLEARED_AFTER):
        ledger.good([C])
    assert not ledger.careful
    assert ledger.sources() == (C,)
    clock.now = SUSPECT_SECONDS
    assert ledger.sources() == (A, B, C)


def test_everybody_suspected_still_leaves_somebody_to_ask() -> None:
    ledger = Ledger([A, B])
    ledger.failed([A, B])
    assert ledger.sources() == (A,)
    ledger.stalled(A)
    assert ledger.sources() == (B,)
    ledger.stalled(B)
    assert ledger.sources() == (A,)


def test_everybody_banned_leaves_nobody() -> None:
    ledger = Ledger([A])
    ledger.failed([A])
    assert ledger.sources() == ()


PEERS = [A, B, C]
LIARS = st.sets(st.sampled_from(PEERS), max_size=2)
PIECES = st.lists(st.sets(st.sampled_from(PEERS), min_size=1), max_size=60)


@given(liars=LIARS, pieces=PIECES)
def test_honest_peers_are_never_banned_and_liars_run_out(liars: set[Endpoint], pieces: list[set[Endpoint]]) -> None:
    """A piece fails exactly if a liar contributed."""
    ledger = Ledger(PEERS)
    honest = set(PEERS) - liars
    for authors in pieces:
        if authors & liars:
            ledger.failed(authors)
        else:
            ledger.good(authors)
        assert not set(ledger.bans) & honest
        assert ledger.sources()
    # Asked one at a time, every liar is found out in one piece each, and honest sources remain.
    for _ in range(4 * CLEARED_AFTER):
        for source in ledger.sources()[:1]:
            if source in liars:
                ledger.failed([source])
            else:
                ledger.good([source])
    assert ledger.sources()[0] in honest
