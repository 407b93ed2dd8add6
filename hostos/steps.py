"""Named, timed steps: one source for progress on a terminal, JSON events and tables.

Code that does something long takes a `Steps`, wraps each part in `with steps.step("name")` and
never prints. Who listens decides what becomes of it: `Talk` writes to stderr for people,
`JsonEvents` writes one object per line for programs, tests read `steps.finished`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TextIO

Kind = Literal["start", "progress", "done", "fail", "note", "warning", "detail"]
Level = Literal["quiet", "normal", "verbose"]


@dataclass(frozen=True)
class Event:
    """Something worth telling. `seconds`: since its step began (0.0 for notes); `at`: Unix time."""

    kind: Kind
    step: str
    detail: str = ""
    seconds: float = 0.0
    at: float = field(default_factory=time.time)


Subscriber = Callable[[Event], None]


@dataclass(frozen=True)
class Finished:
    """A step that ended well; `seconds` is its duration."""

    name: str
    seconds: float
    detail: str = ""


class Step:
    """A running step: `progress()` says how far it is, `detail` is shown when it is done."""

    def __init__(self, name: str, emit: Subscriber) -> None:
        self.name = name
        self.detail = ""
        self._emit = emit
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def progress(self, detail: str) -> None:
        self._emit(Event("progress", self.name, detail, self.seconds))


class Steps:
    """Emits events to its subscribers and keeps the durations of the steps that finished."""

    def __init__(self, *subscribers: Subscriber) -> None:
        self._subscribers = list(subscribers)
        self.finished: list[Finished] = []

    def emit(self, event: Event) -> None:
        for subscriber in self._subscribers:
            subscriber(event)

    def note(self, detail: str) -> None:
        """Something the user should see, e.g. which cached result was used."""
        self.emit(Event("note", "", detail))

    def warning(self, detail: str) -> None:
        """Something the user should act on, though the work goes on."""
        self.emit(Event("warning", "", detail))

    def detail(self, detail: str) -> None:
        """Something for who wants to know exactly (`--verbose`), e.g. a command line."""
        self.emit(Event("detail", "", detail))

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        step = Step(name, self.emit)
        self.emit(Event("start", name))
        try:
            yield step
        except BaseException as error:
            self.emit(Event("fail", name, str(error) or type(error).__name__, step.seconds))
            raise
        self.finished.append(Finished(name, step.seconds, step.detail))
        self.emit(Event("done", name, step.detail, step.seconds))


class Talk:
    """Steps for people, on stderr (stdout is for data).

    On a terminal the running step is rewritten in place; elsewhere each finished step is one line
    and long steps say every 30 s that they are alive. `quiet` leaves only warnings; `verbose` adds
    progress, and what the work is done with.
    """

    ALIVE_EVERY = 30.0

    def __init__(self, stream: TextIO | None = None, *, level: Level = "normal") -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.quiet = level == "quiet"
        self.verbose = level == "verbose"
        self._spoke = 0.0

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if event.kind == "warning":
            self._line(f"warning: {event.detail}")
        elif self.quiet or (event.kind == "detail" and not self.verbose):
            return
        elif event.kind == "start":
            self._spoke = now
            self._transient(event.step)
        elif event.kind == "progress":
            if self.live or self.verbose or now - self._spoke > self.ALIVE_EVERY:
                self._spoke = now
                self._transient(f"{event.step}  {event.seconds:.0f} s  {event.detail}", force=not self.live)
        elif event.kind == "done":
            self._line(f"  {event.seconds:7.2f} s  {event.step}" + (f"  ({event.detail})" if event.detail else ""))
        elif event.kind == "fail":
            self._line(f"  {event.seconds:7.2f} s  {event.step}: FAILED")
        else:
            self._line(event.detail)

    def _transient(self, text: str, *, force: bool = False) -> None:
        if self.live:
            self.stream.write(f"\r\x1b[K  ... {text[:100]}")
            self.stream.flush()
        elif force:
            self._line(f"  ... {text}")

    def _line(self, text: str) -> None:
        self.stream.write(("\r\x1b[K" if self.live else "") + text + "\n")
        self.stream.flush()


class JsonEvents:
    """Steps for programs: one JSON object per line (schema 1: the fields of `Event`).

    The last line is not an event but what came of it: `result` or `error` writes it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __call__(self, event: Event) -> None:
        self._write({**asdict(event), "seconds": round(event.seconds, 3), "at": round(event.at, 3)})

    def result(self, facts: dict[str, Any]) -> None:
        self._write({"kind": "result", **facts})

    def error(self, message: str, hint: str, status: int) -> None:
        self._write({"kind": "error", "message": message, "hint": hint, "status": status})

    def _write(self, content: dict[str, Any]) -> None:
        self.stream.write(json.dumps({"schema": 1, **content}) + "\n")
        self.stream.flush()
