"""Small pictures as SVG text (https://www.w3.org/TR/SVG11/): rectangles, lines, text, dots, time axes.

For pictures a command draws on the side; no fonts or scripts are embedded, tool tips are `<title>`s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape as _escape

INK, FAINT = "#333333", "#dddddd"
COLOURS = ("#4878a8", "#d65f5f", "#6acc65", "#b47cc7", "#c4ad66", "#77bedb")


class Picture:
    """Collects shapes; `text()` is the whole file. Coordinates in pixels from the upper left corner."""

    def __init__(self, width: float, height: float, title: str = "") -> None:
        self.width, self.height = width, height
        self._parts: list[str] = [f"<title>{escape(title)}</title>"] if title else []

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str = INK, *, tip: str = "", opacity: float = 1.0
    ) -> None:
        faded = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
        shape = f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(max(height, 0))}" fill="{fill}"'
        self._add(shape + faded, "rect", tip)

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str = INK, *, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._add(f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" stroke="{stroke}"{dash}', "line")

    def curve(self, points: Iterable[tuple[float, float]], stroke: str = INK, width: float = 1.5) -> None:
        places = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self._add(f'<polyline points="{places}" fill="none" stroke="{stroke}" stroke-width="{_n(width)}"', "polyline")

    def text(
        self, x: float, y: float, words: str, *, size: float = 11, anchor: str = "start", fill: str = INK, turn: int = 0
    ) -> None:
        """`anchor`: which end of the text is at x: `start`, `middle` or `end`; `turn`: degrees clockwise."""
        turned = f' transform="rotate({turn} {_n(x)} {_n(y)})"' if turn else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" text-anchor="{anchor}" fill="{fill}"{turned}>'
            f"{escape(words)}</text>"
        )

    def _add(self, shape: str, name: str, tip: str = "") -> None:
        self._parts.append(f"{shape}><title>{escape(tip)}</title></{name}>" if tip else f"{shape}/>")

    def to_text(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_n(self.width)}" height="{_n(self.height)}" '
            f'viewBox="0 0 {_n(self.width)} {_n(self.height)}" font-family="sans-serif">'
        )
        return "\n".join((head, '<rect width="100%" height="100%" fill="white"/>', *self._parts, "</svg>\n"))


@dataclass(frozen=True)
class Axis:
    """Values from 0 to `end` on pixels from `low` to `high`."""

    end: float
    low: float
    high: float

    def at(self, value: float) -> float:
        return self.low + (self.high - self.low) * value / (self.end or 1.0)

    def ticks(self, most: int = 10) -> list[float]:
        """Round values, at most so many."""
        step = 10.0 ** math.floor(math.log10(max(self.end, 1e-9) / most))
        for factor in (1, 2, 5, 10, 20, 50):
            if self.end / (step * factor) <= most:
                step *= factor
                break
        return [round(number * step, 9) for number in range(int(self.end / step + 1e-9) + 1)]


def escape(text: str) -> str:
    """For text and attributes; what XML 1.0 does not allow at all (§2.2) becomes a blank."""
    return _escape("".join(char if char >= " " and not _forbidden(char) else " " for char in text))


def _forbidden(char: str) -> bool:
    return "\ud800" <= char <= "\udfff" or char in "\ufffe\uffff"


def _n(value: float) -> str:
    return f"{round(value, 2):g}"
