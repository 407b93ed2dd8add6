"""`hostos cp`: which words are paths in a guest, and the scp command line that copies."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError
from hostos.machine.instance import Instance
from hostos.machine.ssh import alias, write_all_machines_config

# As scp tells them apart: a colon before any slash.
_IN_A_GUEST = re.compile(r"([^/:]*):(.*)", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """A path, in the guest `machine` or, if that is None, on this host."""

    machine: str | None
    path: str


def parse_place(word: str, default: str) -> Place:
    """`:PATH` (the guest of `default`), `MACHINE:PATH`, or a path of this host (`./a:b` too)."""
    match = _IN_A_GUEST.fullmatch(word)
    return Place(match[1] or default, match[2]) if match else Place(None, word)


def scp_command(words: Sequence[str], default: str, *, recursive: bool, preserve: bool, quiet: bool) -> list[str]:
    """The scp command line that copies `words[:-1]` to `words[-1]`.

    Raises UserError if no side is a running machine, a source is not there, or a directory is to
    be copied without `recursive`.
    """
    scp = shutil.which("scp")
    if not scp:
        raise UserError("scp is not installed", "install the OpenSSH client (openssh-client)")
    if len(words) < 2:
        raise UserError("what shall be copied where?", "hostos cp FILE :/tmp/, or hostos cp :/etc/os-release .")
    places = [parse_place(word, default) for word in words]
    machines = dict.fromkeys(place.machine for place in places if place.machine)
    if not machines:
        raise UserError("both sides are on this host", "a path in the guest begins with a colon: hostos cp FILE :/tmp/")
    for place in places[:-1]:
        _check_source(place, recursive=recursive)
    for name in machines:
        Instance.load(name).require_running()
    line = [scp, "-F", str(write_all_machines_config())]
    line += [flag for flag, wanted in (("-r", recursive), ("-p", preserve), ("-q", quiet)) if wanted]
    if all(place.machine for place in places):
        # From guest to guest through this host: they have no keys for each other.
        line.append("-3")
    return [*line, "--", *map(_word, places)]


def _check_source(place: Place, *, recursive: bool) -> None:
    if place.machine:
        return
    path = Path(place.path)
    if not path.exists():
        raise UserError(f"{place.path} does not exist", "a path in the guest begins with a colon: hostos cp :FILE .")
    if path.is_dir() and not recursive:
        raise UserError(f"{place.path} is a directory", f"hostos cp -r {place.path} …")


def _word(place: Place) -> str:
    if place.machine:
        return f"{alias(place.machine)}:{place.path}"
    # scp would take a colon for a host, a leading hyphen for an option.
    return place.path if place.path.startswith("/") else f"./{place.path}"
