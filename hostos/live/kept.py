"""What containers write, kept under a name beyond their end (`--persist NAME`).

On the machine's disk where it has one, else in memory for as long as the machine runs. A directory per name:
`changes` and `work` of the overlay, and `kept.json`, which says what they belong to: an overlay makes sense
only over the layers it was made over, and only with the users it was made with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostos.errors import UserError, failure
from hostos.live import syscalls
from hostos.live.container import LAST_BASE, check_name
from hostos.live.syscalls import IDS

SCHEMA = 1
DISK = Path("/var/lib/hostos")
"""Where the guest mounts the machine's disk."""
MEMORY = Path("/run/hostos/kept")
SIZE = "50%"
"""Of the memory, where there is no disk."""
MOST = 4096
"""Most names on one machine."""


@dataclass(frozen=True)
class Kept:
    """`base`: first user of its range; `lasting`: whether it outlives the machine's present run."""

    path: Path
    base: int
    lasting: bool


class Store:
    """All that is kept. `directory`: where; None: on the disk, or in memory if there is none."""

    def __init__(self, directory: Path | None = None) -> None:
        self._given = directory

    def _place(self) -> tuple[Path, bool]:
        if self._given is not None:
            return self._given, True
        if DISK.is_mount():
            return DISK / "containers", True
        MEMORY.mkdir(parents=True, exist_ok=True)
        if not MEMORY.is_mount():
            syscalls.mount("hostos-kept", MEMORY, "tmpfs", syscalls.MS_NODEV, f"size={SIZE},mode=0700")
        return MEMORY, False

    def take(self, name: str, image: str) -> Kept:
        """What is kept under `name`, made if it is new. Raises UserError: it belongs to another image."""
        check_name(name)
        try:
            place, lasting = self._place()
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = place / name
            record = _read(path)
            if record is None:
                used = {known["base"] for other in place.iterdir() if (known := _read(other))}
                # From the other end than containers that keep nothing: nobody else ever has it.
                bases = range(LAST_BASE, LAST_BASE - MOST * IDS, -IDS)
                base = next((base for base in bases if base not in used), None)
                if base is None:
                    raise UserError(f"{MOST} names are kept already", f"remove some from {place} in the machine")
                path.mkdir(mode=0o700, exist_ok=True)
                record = {"schema": SCHEMA, "image": image, "base": base}
                (path / "kept.json").write_text(json.dumps(record) + "\n")
        except OSError as error:
            raise failure(f"--persist {name}: {error}") from None
        if record["image"] != image:
            raise UserError(
                f"what is kept as {name!r} was made over image {record['image'][:16]}…",
                f"boot that image, take another name, or remove it: hostos ssh -- rm -r {path}",
            )
        return Kept(path, record["base"], lasting)


def _read(path: Path) -> dict[str, Any] | None:
    """What is known of a kept directory; None if nothing (it may not be one)."""
    try:
        record = json.loads((path / "kept.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return None
    if not isinstance(record.get("base"), int) or not isinstance(record.get("image"), str):
        return None
    return record
