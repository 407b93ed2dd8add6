"""What stays behind when something was killed: nspawn's own mounts, and a whole daemon's containers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from hostos.live import syscalls
from hostos.live.mounts import clean_up
from hostos.live.processes import Process, leader
from hostos.live.running import KILL_LIMIT


def forget(name: str) -> None:
    """Remove what an nspawn that was killed leaves, or it refuses to start another of that name."""
    for place in (Path("/run/systemd/nspawn/unix-export") / name, Path("/run/systemd/nspawn/propagate") / name):
        with suppress(OSError):
            syscalls.unmount(place, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        with suppress(OSError):
            place.rmdir()


def end_leftovers(state: Path, place: Path) -> int:
    """End what an earlier daemon that was killed left behind; how many containers there were.

    Their layers were served by that daemon: they cannot go on reading.
    """
    found = 0
    for record in state.glob("*/state.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            root = json.loads(record.read_text())["root"]
            for entry in Path("/proc").iterdir():
                if not entry.name.isdigit():
                    continue
                with suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if f"--directory={root}".encode() in words and b"systemd-nspawn" in words[0]:
                        _end(Process(int(entry.name)))
                        found += 1
        forget(record.parent.name)
        shutil.rmtree(record.parent, ignore_errors=True)
    clean_up(place)
    return found


def _end(supervisor: Process) -> None:
    """Kill its container, which lets nspawn clean up after itself, then nspawn if it doesn't end."""
    if number := leader(supervisor.number):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    give_up = time.monotonic() + KILL_LIMIT
    while supervisor.alive and time.monotonic() < give_up:
        time.sleep(0.02)
    supervisor.send(signal.SIGKILL)
    supervisor.close()
