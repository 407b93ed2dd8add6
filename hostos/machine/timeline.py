"""Where the time of a start goes: stages on the host, the kernel, the units of the guest.

The guest is asked once, when it is ready: /proc/uptime places its clock on the host's (as exactly
as the question takes), dmesg has the kernel's, `systemctl show` the units' times. That needs no
D-Bus, which `systemd-analyze plot` wants.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hostos.errors import UserError, failure
from hostos.machine.process import age_of
from hostos.steps import Event

if TYPE_CHECKING:
    from hostos.machine.connection import Connection

Kind = Literal["host", "kernel", "manager", "unit"]

_ASK_SECONDS = 60.0
# A silence of the kernel's is worth a line of its own from here on, and only the longest are.
_SILENCE = 0.02
_SILENCES = 12
_MANAGER = {
    "Security": "security modules",
    "Generators": "generators",
    "UnitsLoad": "loads units",
}
_UNIT_TYPES = (".service", ".socket", ".target", ".mount", ".timer", ".path", ".swap")
_QUESTIONS = """\
systemctl show
echo =====
systemctl show '*' -p Id -p InactiveExitTimestampMonotonic -p ActiveEnterTimestampMonotonic \
 -p InactiveEnterTimestampMonotonic
echo =====
dmesg
"""


@dataclass(frozen=True)
class Span:
    """Something that took from `start` to `end`, seconds since `hostos` was started (of the guest's
    own, before they are placed: since its kernel's start)."""

    kind: Kind
    name: str
    start: float
    end: float
    detail: str = ""


class Recorder:
    """Listens to steps and keeps the stages."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.spans: list[Span] = []
        self._first: float | None = None

    def __call__(self, event: Event) -> None:
        if self._first is None:
            self._first = event.at
            self.spans.append(Span("host", "hostos itself", 0.0, max(0.0, event.at - self.began)))
        if event.kind in ("done", "fail"):
            end = event.at - self.began
            self.spans.append(Span("host", event.step, max(0.0, end - event.seconds), end, event.detail))


def process_began() -> float:
    """When this process was started, Unix time (on Linux in steps of 10 ms)."""
    return time.time() - age_of(os.getpid())


def of_guest(guest: Connection, began: float) -> list[Span]:
    """What the kernel and the units did since `began`. Raises UserError (status 1)."""
    from hostos.machine.connection import ConnectionLost

    try:
        before = time.time()
        uptime = guest.run(["cat", "/proc/uptime"], timeout=_ASK_SECONDS).stdout
        after = time.time()
        answer = guest.run(["sh", "-c", _QUESTIONS], timeout=_ASK_SECONDS).stdout.decode(errors="replace")
    except ConnectionLost as error:
        raise failure(f"no timeline: {error}") from error
    try:
        zero = (before + after) / 2 - float(uptime.split()[0]) - began
        manager, units, messages = answer.split("=====\n")
    except (ValueError, IndexError) as error:
        raise failure(f"no timeline: the guest's answer is not understood ({error})", "is it an OS of ours?") from None
    properties = dict(_pairs(manager))
    userspace = _seconds(properties.get("UserspaceTimestampMonotonic"))
    now = after - began - zero
    spans = [*kernel(messages, userspace or now), *of_manager(properties), *of_units(units, now)]
    # What was before: a machine that was loaded from a template has its boot from there.
    return [
        Span(span.kind, span.name, span.start + zero, span.end + zero, span.detail)
        for span in spans
        if span.start + zero >= -0.5
    ]


def kernel(messages: str, until: float) -> Iterator[Span]:
    """The kernel as a whole, and its longest silences, from what dmesg prints; seconds since its start."""
    lines: list[tuple[float, str]] = []
    latest = 0.0
    for line in messages.splitlines():
        match = re.match(r"\[\s*(\d+\.\d+)\] (.*)", line)
        if match and float(match[1]) <= until:
            # The clock is set right on the way: a step back is no time that was gained.
            latest = max(latest, float(match[1]))
            lines.append((latest, match[2]))
    if not lines:
        return
    yield Span("kernel", "Linux", 0.0, until, f"{len(lines)} messages")
    times = [at for at, _ in lines[1:]] + [until]
    gaps = [Span("kernel", text, at, end) for (at, text), end in zip(lines, times, strict=True) if end - at >= _SILENCE]
    longest = sorted(gaps, key=lambda span: span.start - span.end)[:_SILENCES]
    yield from sorted(longest, key=lambda span: span.start)


def of_manager(properties: dict[str, str]) -> Iterator[Span]:
    """systemd itself, from `systemctl show`; seconds since the kernel's start."""
    start = _seconds(properties.get("UserspaceTimestampMonotonic"))
    finish = _seconds(properties.get("FinishTimestampMonotonic"))
    if start and finish:
        yield Span("manager", "systemd", start, finish, "from its start until all is up")
    for name, text in _MANAGER.items():
        begin = _seconds(properties.get(f"{name}StartTimestampMonotonic"))
        end = _seconds(properties.get(f"{name}FinishTimestampMonotonic"))
        if begin and end:
            yield Span("manager", text, begin, end)


def of_units(text: str, now: float) -> Iterator[Span]:
    """Units that were started, from `systemctl show '*'`; seconds since the kernel's start.

    Until a unit is active it is starting; what never is (a oneshot) takes until it is inactive again.
    """
    found = []
    for block in text.split("\n\n"):
        properties = dict(_pairs(block))
        name = properties.get("Id", "")
        start = _seconds(properties.get("InactiveExitTimestampMonotonic"))
        if not start or not name.endswith(_UNIT_TYPES) or name == "-.mount":
            continue
        active = _seconds(properties.get("ActiveEnterTimestampMonotonic"))
        inactive = _seconds(properties.get("InactiveEnterTimestampMonotonic"))
        end = active if active >= start else inactive if inactive >= start else now
        found.append(Span("unit", name, start, end, "" if active or inactive else "still starting"))
    yield from sorted(found, key=lambda span: (span.start, span.end, span.name))


def check_target(text: str) -> None:
    """Raises UserError if a timeline could not be written to the path `text`."""
    from pathlib import Path

    path = Path(text)
    if path.suffix not in (".svg", ".json"):
        raise UserError(f"--timeline {text}: what kind of file is that?", "a picture: FILE.svg, or data: FILE.json")
    if not path.parent.is_dir():
        raise UserError(f"--timeline {text}: {path.parent} is no directory", "make it, or name another")


def write(text: str, title: str, spans: list[Span]) -> None:
    """Write the picture (or the data) to the path `text`. Raises UserError (status 1)."""
    import json
    from dataclasses import asdict
    from pathlib import Path

    from hostos.machine.timeline_picture import draw

    if text.endswith(".svg"):
        content = draw(title, spans)
    else:
        facts = {"schema": 1, "title": title, "spans": [asdict(span) for span in spans]}
        content = json.dumps(facts, indent=1)
    try:
        Path(text).write_text(content)
    except OSError as error:
        raise failure(f"{text} cannot be written: {error.strerror}", "the machine runs all the same") from None


def _pairs(text: str) -> Iterable[tuple[str, str]]:
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            yield name, value


def _seconds(microseconds: str | None) -> float:
    return int(microseconds) / 1e6 if microseconds and microseconds.isdigit() else 0.0
