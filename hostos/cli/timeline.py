"""The picture of a container's boot: which blocks came when and why, against what it had reached."""

from __future__ import annotations

from typing import Any

from hostos.svg import COLOURS, FAINT, INK, Axis, Picture

WIDTH, HEIGHT = 1000, 620
LEFT, RIGHT, TOP, MIDDLE, BOTTOM = 70, 980, 70, 440, 590

WHYS = {
    "demand": (COLOURS[1], "somebody waited for it"),
    "trace": (COLOURS[0], "boot trace"),
    "ahead": (COLOURS[2], "read-ahead"),
    "rest": (COLOURS[4], "the rest, while idle"),
}
READ = "#999999"
MARGIN = 1.05
"""The picture goes on that much longer than what happened."""


def draw(figures: dict[str, Any]) -> str:
    """SVG of the answer to the daemon's `timeline`."""
    layers = figures["layers"]
    came = [(when, index, piece, why) for index, layer in enumerate(layers) for when, piece, why in layer["came"]]
    read = [(when, index, piece) for index, layer in enumerate(layers) for when, piece in layer["read"]]
    # What an earlier container had fetched lies before this one's beginning.
    before = sum(1 for item in came if item[0] < 0)
    came, read = [item for item in came if item[0] >= 0], [item for item in read if item[0] >= 0]
    moments = [*(item[0] for item in came), *(item[0] for item in read), *figures["milestones"].values()]
    seconds = Axis(MARGIN * max(moments, default=1.0), LEFT, RIGHT)
    starts, total = [], 0
    for layer in layers:
        starts.append(total)
        total += layer["pieces"]
    place = Axis(total, TOP, MIDDLE)
    picture = Picture(WIDTH, HEIGHT, f"{figures['name']}: what came when")
    picture.text(LEFT, 22, f"{figures['name']} ({figures['image_name']})", size=15)
    _legend(picture, came, before)
    _grid(picture, seconds)
    picture.text(20, (TOP + MIDDLE) / 2, "place in the image", anchor="middle", turn=-90)
    for start in starts[1:]:
        picture.line(LEFT, place.at(start), RIGHT, place.at(start), FAINT)
    thick = max(1.5, (MIDDLE - TOP) / max(total, 1))
    for when, index, piece in read:
        picture.rect(seconds.at(when), place.at(starts[index] + piece), 2, thick, READ)
    for when, index, piece, why in came:
        tip = f"piece {piece} of layer {index} after {when:.3f} s: {WHYS[why][1]}"
        picture.rect(seconds.at(when), place.at(starts[index] + piece), 3, thick, WHYS[why][0], tip=tip)
    _received(picture, seconds, came, [layer["piece_size"] for layer in layers])
    for number, (name, when) in enumerate(sorted(figures["milestones"].items(), key=lambda item: item[1])):
        picture.line(seconds.at(when), TOP, seconds.at(when), BOTTOM, INK, dashed=True)
        picture.text(seconds.at(when) + 3, MIDDLE + 14 + 11 * (number % 3), f"{name} {when:.2f} s", size=10)
    return picture.to_text()


def _legend(picture: Picture, came: list[tuple[float, int, int, str]], before: int) -> None:
    x = float(LEFT)
    counts = {why: sum(1 for item in came if item[3] == why) for why in WHYS}
    for why, (colour, words) in WHYS.items():
        if counts[why]:
            picture.rect(x, 36, 10, 10, colour)
            picture.text(x + 14, 45, f"{words}: {counts[why]}")
            x += 40 + 6.2 * len(words) + 30
    picture.rect(x, 36, 10, 10, READ)
    picture.text(x + 14, 45, "first read" + (f"; {before} pieces were here before" if before else ""))


def _grid(picture: Picture, seconds: Axis) -> None:
    for tick in seconds.ticks():
        picture.line(seconds.at(tick), TOP, seconds.at(tick), BOTTOM, FAINT)
        picture.text(seconds.at(tick), BOTTOM + 16, f"{tick:g} s", anchor="middle")
    for y in (TOP, MIDDLE, BOTTOM):
        picture.line(LEFT, y, RIGHT, y)


def _received(picture: Picture, seconds: Axis, came: list[tuple[float, int, int, str]], sizes: list[int]) -> None:
    """The sum of what came, below."""
    total, points = 0.0, [(seconds.at(0), float(BOTTOM))]
    steps = []
    for when, index, _, _ in sorted(came):
        total += sizes[index] / 1e6
        steps.append((when, total))
    height = Axis(total, BOTTOM, MIDDLE + 40)
    points += [(seconds.at(when), height.at(sum_)) for when, sum_ in steps]
    picture.curve(points, COLOURS[0])
    picture.text(20, (MIDDLE + BOTTOM) / 2, "MB received", anchor="middle", turn=-90)
    picture.text(LEFT - 6, height.at(total) + 4, f"{total:.1f}", anchor="end")
