"""Following a Buildroot build: which package it is at, how far it is, what went wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

_STEP = re.compile(
    r">>> (\S+) (\S*) ?(Downloading|Extracting|Patching|Configuring|Building|Installing to \w+|Installing|"
    r"Syncing from source dir|Autoreconfiguring|Creating|Finalizing|Generating)"
)
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[a-zA-Z]|\x1b\(B")
_EXPECTED = re.compile(r"ERROR: expected: (\S+)")
_GOT = re.compile(r"ERROR: got     : (\S+)")
_WRONG = re.compile(r"ERROR: (?:while checking hashes from )?(\S+) has wrong (\S+) hash")
_NO_HASH = re.compile(r"ERROR: No hash found for (\S+)")


@dataclass
class Progress:
    """Fed every line of the build's output. `total`: packages the build consists of; `done`: how
    many of them were finished before it began; `tell` gets a line fit for a progress display."""

    total: int
    tell: Callable[[str], None]
    done: int = 0
    package: str = ""
    activity: str = ""
    seen: set[str] = field(default_factory=set)
    wrong_hash: str = ""
    expected: str = ""
    got: str = ""
    no_hash: str = ""

    def feed(self, raw: str) -> None:
        line = _ESCAPE.sub("", raw)
        if found := _STEP.search(line):
            self.package, self.activity = found[1], found[3].lower()
            self.seen.add(self.package)
            self.say("")
        elif found := _WRONG.search(line):
            self.wrong_hash = found[1]
        elif found := _EXPECTED.search(line):
            self.expected = found[1]
        elif found := _GOT.search(line):
            self.got = found[1]
        elif found := _NO_HASH.search(line):
            self.no_hash = found[1]
        elif line.strip():
            self.say(line.strip())

    def say(self, last: str) -> None:
        if self.package:
            count = min(self.done + len(self.seen), self.total)
            self.tell(f"{count} of {self.total}  {self.package}: {self.activity}" + (f"  {last[:60]}" if last else ""))

    def explain(self) -> tuple[str, str] | None:
        """Message and hint for a fault that was recognised in the output, else None."""
        if self.wrong_hash:
            pair = f"    expected {self.expected}\n    got      {self.got}"
            hint = "delete it where it came from, and if upstream itself changed it, find out why before building it"
            return f"{self.wrong_hash} is not the file Buildroot expects:\n{pair}", hint
        if self.no_hash:
            return (
                f"{self.no_hash} has no hash, and every source must have one",
                "add it to the package's .hash file in buildroot-external/",
            )
        return None


def seconds_by_package(log: str) -> dict[str, float]:
    """Build seconds of each package from Buildroot's build-time.log, slowest first.

    Its lines are `seconds.nanoseconds:start|end : step : package`.
    """
    began: dict[tuple[str, str], float] = {}
    total: dict[str, float] = {}
    for line in log.splitlines():
        parts = [part.strip() for part in line.split(":")]
        if len(parts) != 4:
            continue
        try:
            at = float(parts[0])
        except ValueError:
            continue
        key = (parts[2], parts[3])
        if parts[1] == "start":
            began[key] = at
        elif parts[1] == "end" and key in began:
            total[parts[3]] = total.get(parts[3], 0.0) + at - began.pop(key)
    return dict(sorted(total.items(), key=lambda item: -item[1]))
