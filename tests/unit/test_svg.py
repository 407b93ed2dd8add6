"""Pictures: well-formed whatever is drawn, and a container's timeline shows all that came."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from hostos.cli.timeline import draw
from hostos.svg import Axis, Picture

SVG = "{http://www.w3.org/2000/svg}"


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cc", "Cs"))), st.floats(-1e6, 1e6))
def test_any_text_gives_a_well_formed_picture(words: str, number: float) -> None:
    picture = Picture(100, 50, words)
    picture.rect(number, 1, 2, 3, tip=words)
    picture.line(number, 0, 1, 1, dashed=True)
    picture.text(1, number, words, turn=90)
    picture.curve([(0, number), (1, 1)])
    root = ElementTree.fromstring(picture.to_text())
    assert [item.text or "" for item in root.iter(f"{SVG}text")] == [words]


@settings(deadline=None)
@given(st.floats(1e-3, 1e6), st.integers(2, 20))
def test_ticks_are_few_and_on_the_axis(end: float, most: int) -> None:
    axis = Axis(end, 10, 110)
    ticks = axis.ticks(most)
    assert 1 <= len(ticks) <= most + 1
    assert all(9.99 <= axis.at(tick) <= 110.1 for tick in ticks)


FIGURES = {
    "name": "web<1>",
    "image_name": "a&b",
    "seconds": 2.0,
    "milestones": {"metadata": 0.1, "started": 0.5},
    "layers": [
        {"pieces": 4, "piece_size": 65536, "came": [[-1.0, 0, "demand"], [0.2, 1, "trace"]], "read": [[0.3, 1]]},
        {"pieces": 9, "piece_size": 65536, "came": [[0.4, 8, "ahead"], [0.6, 2, "rest"]], "read": []},
    ],
}


def test_a_timeline_shows_each_piece_and_milestone() -> None:
    root = ElementTree.fromstring(draw(FIGURES))
    tips = [item.text or "" for item in root.iter(f"{SVG}title")]
    assert [tip.partition(":")[0] for tip in tips if tip.startswith("piece")] == [
        "piece 1 of layer 0 after 0.200 s",
        "piece 8 of layer 1 after 0.400 s",
        "piece 2 of layer 1 after 0.600 s",
    ]
    words = " ".join(item.text or "" for item in root.iter(f"{SVG}text"))
    for expected in ("web<1> (a&b)", "boot trace: 1", "read-ahead: 1", "metadata 0.10 s", "1 pieces were here before"):
        assert expected in words
    assert "somebody waited" not in words


def test_a_timeline_of_nothing_is_a_picture_too() -> None:
    empty = {**FIGURES, "milestones": {}, "layers": [{"pieces": 4, "piece_size": 1, "came": [], "read": []}]}
    assert ElementTree.fromstring(draw(empty)).tag == f"{SVG}svg"
