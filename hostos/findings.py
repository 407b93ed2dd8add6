"""What `hostos doctor` finds: one line each, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """`name`: what was looked at. A `fault` keeps machines from starting; a `warning` keeps
    something from working, or from working well. `fix`: what to type or to change."""

    name: str
    level: Level
    says: str
    fix: str = ""


def ok(name: str, says: str) -> Finding:
    return Finding(name, "ok", says)


def warning(name: str, says: str, fix: str) -> Finding:
    return Finding(name, "warning", says, fix)


def fault(name: str, says: str, fix: str) -> Finding:
    return Finding(name, "fault", says, fix)
