"""Readers that are blocked until a piece of a torrent is there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import trio


@dataclass
class Wait:
    """For one piece. `event` is set when it is there; `left`: to another machine, so far; `began`, `asked`:
    `time.monotonic()` when the first reader came, and when somebody was last asked for it."""

    piece: int
    event: trio.Event = field(default_factory=trio.Event)
    readers: int = 1
    left: bool = False
    began: float = field(default_factory=time.monotonic)
    asked: float = field(default_factory=time.monotonic)


class Readers:
    """All of one torrent, by piece. True while somebody waits."""

    def __init__(self) -> None:
        self._waits: dict[int, Wait] = {}

    def __bool__(self) -> bool:
        return bool(self._waits)

    def __contains__(self, piece: int) -> bool:
        return piece in self._waits

    def __iter__(self) -> Iterator[Wait]:
        return iter(list(self._waits.values()))

    def find(self, piece: int) -> Wait | None:
        """What readers of that piece wait for, if there are any; one more does now."""
        if (wait := self._waits.get(piece)) is not None:
            wait.readers += 1
        return wait

    def begin(self, piece: int) -> Wait:
        """The first one waits for that piece."""
        wait = self._waits[piece] = Wait(piece)
        return wait

    async def wait(self, wanted: Sequence[Wait], deadline: float) -> None:
        """Until all of them are there, `deadline` seconds at most."""
        try:
            with trio.move_on_after(deadline):
                for wait in wanted:
                    await wait.event.wait()
        finally:
            for wait in wanted:
                wait.readers -= 1
                if not wait.readers and self._waits.get(wait.piece) is wait:
                    del self._waits[wait.piece]

    def wake(self, piece: int) -> None:
        """It is there."""
        if wait := self._waits.pop(piece, None):
            wait.event.set()

    def wake_all(self) -> None:
        """Nothing will come any more."""
        for piece in list(self._waits):
            self.wake(piece)
