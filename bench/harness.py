"""Measuring side by side: samples, medians, ratios, the machine they were taken on, JSON and a plot."""

from __future__ import annotations

import compileall
import hashlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hostos.errors import UserError

RESULTS = Path(__file__).parent / "results"


@dataclass
class Series:
    """One thing measured several times. `samples` in `unit`."""

    name: str
    unit: str = "s"
    samples: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass
class Comparison:
    """Series of one run; the ratio of each to `peer` is what is published."""

    title: str
    peer: str
    series: list[Series]
    goal: dict[str, float] = field(default_factory=dict)

    def ratio(self, series: Series) -> float:
        reference = next(each for each in self.series if each.name == self.peer)
        return series.median / reference.median

    def table(self) -> str:
        lines = [f"{self.title}  (ratios to {self.peer})"]
        for each in self.series:
            goal = self.goal.get(each.name)
            verdict = ""
            if goal is not None:
                verdict = f"  goal {goal:g} x: " + ("reached" if self.ratio(each) <= goal else "MISSED")
            spread = f"{min(each.samples):.2f} to {max(each.samples):.2f}"
            lines.append(
                f"  {each.name:44} {each.median:8.2f} {each.unit}  ({spread}, n={len(each.samples)})"
                f"  {self.ratio(each):6.3f} x{verdict}"
            )
        return "\n".join(lines)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def prepare() -> dict[str, Any]:
    """Before anything is measured: what the figures depend on.

    What is measured has its byte code, as where it has been installed. Where PYTHONDONTWRITEBYTECODE is set, as in many
    containers, each start would else compile its modules anew (0.1 s).
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(Path(__file__).parent.parent / "hostos", quiet=1)
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": qemu.partition("\n")[0],
        "load": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def chosen(only: Sequence[str], parts: Iterable[str]) -> list[str]:
    """Which `parts` of a benchmark are measured: those of `only`, or all. Raises UserError for an unknown one."""
    known = list(parts)
    if unknown := [each for each in only if each not in known]:
        raise UserError(f"no part is called {unknown[0]!r}", f"--only {', --only '.join(known)}")
    return [each for each in known if not only or each in only]


def publish(name: str, comparisons: Sequence[Comparison], before: dict[str, Any]) -> Path:
    """Print the tables, write `bench/results/<name>.json` and a plot beside it; returns the JSON's path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "schema": 1,
        "machine": before,
        "comparisons": [
            {**asdict(each), "ratios": {series.name: each.ratio(series) for series in each.series}}
            for each in comparisons
        ],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    for each in comparisons:
        print(each.table())
    _plot(comparisons, path.with_suffix(".svg"))
    print(f"results: {path}")
    return path


def _plot(comparisons: Sequence[Comparison], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(comparisons), 1, figsize=(9, 1.2 + 2.2 * len(comparisons)), squeeze=False)
    for axis, comparison in zip(axes[:, 0], comparisons, strict=True):
        names = [f"{each.name} ({comparison.ratio(each):.2f} x)" for each in comparison.series]
        axis.barh(names, [each.median for each in comparison.series], color="#4878a8")
        axis.set_title(comparison.title, loc="left", fontsize=10)
        axis.set_xlabel(comparison.series[0].unit)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
