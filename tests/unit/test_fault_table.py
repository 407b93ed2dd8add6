"""docs/machine.md's table of faults names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PLACES = [*(REPOSITORY / "tests" / "faults").glob("*.py"), *(REPOSITORY / "tests" / "unit" / "machine").glob("*.py")]


def test_every_test_the_fault_table_names_exists() -> None:
    there = {name for path in PLACES for name in re.findall(r"^def test_(\w+)\(", path.read_text(), re.M)}
    section = (REPOSITORY / "docs" / "machine.md").read_text().partition("\n## Faults\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| fault ")]
    assert len(rows) >= 20
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.rstrip("| ").rpartition("|")[2])}
    assert named - there == set()
