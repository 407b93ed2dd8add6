"""A timeline as a picture: time runs to the right, each row is one stage, silence or unit."""

from __future__ import annotations

from hostos.machine.timeline import Kind, Span
from hostos.svg import FAINT, Axis, Picture

_GROUPS: dict[Kind, tuple[str, str]] = {
    "host": ("on the host", "#4477aa"),
    "kernel": ("kernel: as a whole, and after which message it was silent longest", "#cc6677"),
    "manager": ("systemd", "#117733"),
    "unit": ("units in the guest, while they start", "#999933"),
}
_ROW = 18.0
_TOP = 48.0
_LEFT = 16.0
_WIDTH = 1100.0
# Room for a label to the right of a bar that ends late.
_RIGHT = 420.0


def draw(title: str, spans: list[Span]) -> str:
    """The SVG text of `spans` (times in seconds)."""
    groups = [(kind, [span for span in spans if span.kind == kind]) for kind in _GROUPS]
    groups = [(kind, members) for kind, members in groups if members]
    axis = Axis(max([0.001, *(span.end for span in spans)]), _LEFT, _LEFT + _WIDTH)
    rows = sum(len(members) + 1.6 for _, members in groups)
    bottom = _TOP + 20 + rows * _ROW
    drawing = Picture(_LEFT + _WIDTH + _RIGHT, bottom + 16, title)
    drawing.text(_LEFT, 20, title, size=15)
    for seconds in axis.ticks(16):
        drawing.line(axis.at(seconds), _TOP - 6, axis.at(seconds), bottom, FAINT)
        drawing.text(axis.at(seconds), _TOP - 10, f"{seconds:g} s", anchor="middle")
    y = _TOP + 14
    for kind, members in groups:
        heading, colour = _GROUPS[kind]
        drawing.text(_LEFT, y, heading, fill=colour, size=13)
        y += 0.6 * _ROW
        for span in members:
            took = span.end - span.start
            more = f"  ({span.detail})" if span.detail else ""
            words = f"{_shortened(span.name)} {_duration(took)}{more}"
            # What was there before is cut off; what took no time is still to be seen.
            left, right = axis.at(max(0.0, span.start)), axis.at(max(0.0, span.end))
            tip = f"{words}, from {span.start:.3f} s"
            drawing.rect(left, y, max(right - left, 0.7), _ROW - 5, colour, tip=tip)
            drawing.text(right + 5, y + _ROW - 8, words)
            y += _ROW
        y += _ROW
    return drawing.to_text()


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"


def _shortened(text: str, most: int = 56) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
