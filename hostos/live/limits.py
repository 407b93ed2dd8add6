"""How much of the machine a container may take: memory, processor time, processes.

The kernel's control groups hold it to that, through systemd: properties of the scope or unit it runs in
(systemd.resource-control(5)).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hostos.errors import UserError

LEAST_MEMORY = 16 * 1024 * 1024
LEAST_PIDS = 8
"""systemd-nspawn itself counts, too."""
MOST_CPUS = 1024

_SIZE = re.compile(r"([1-9][0-9]{0,11})([kKmMgG]?)")
_CPUS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,2})?")


@dataclass(frozen=True)
class Limits:
    """`memory`: bytes; `cpus`: processors' worth of time; `pids`: processes and threads. None: no limit."""

    memory: int | None = None
    cpus: float | None = None
    pids: int | None = None

    @classmethod
    def parse(cls, memory: str = "", cpus: str = "", pids: str = "") -> Limits:
        """Reads `512m`, `1.5`, `100`; empty: no limit. Raises UserError."""
        return cls(_memory(memory), _cpus(cpus), _pids(pids))

    def __bool__(self) -> bool:
        return (self.memory, self.cpus, self.pids) != (None, None, None)

    def properties(self) -> list[str]:
        """As systemd takes them. Swap is none, or memory would be limited in name only."""
        found = []
        if self.memory is not None:
            found += [f"MemoryMax={self.memory}", "MemorySwapMax=0"]
        if self.cpus is not None:
            found.append(f"CPUQuota={round(100 * self.cpus)}%")
        if self.pids is not None:
            found.append(f"TasksMax={self.pids}")
        # One process that is killed for want of memory does not end the others.
        return [*found, "OOMPolicy=continue"] if found else []


NO_LIMITS = Limits()


def _memory(text: str) -> int | None:
    if not text:
        return None
    match = _SIZE.fullmatch(text)
    size = int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()] if match else 0
    if size < LEAST_MEMORY:
        raise UserError(f"--memory {text[:40]!r} is no limit for a container", "write 16m or more, e.g. 512m or 2g")
    return size


def _cpus(text: str) -> float | None:
    if not text:
        return None
    if not _CPUS.fullmatch(text) or not 0.01 <= float(text) <= MOST_CPUS:
        raise UserError(f"--cpus {text[:40]!r} is no number of processors", "write e.g. 0.5 or 2")
    return float(text)


def _pids(text: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,6}", text) or int(text) < LEAST_PIDS:
        raise UserError(f"--pids {text[:40]!r} is no limit for a container", f"write {LEAST_PIDS} or more, e.g. 100")
    return int(text)
