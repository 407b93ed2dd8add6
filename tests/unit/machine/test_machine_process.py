from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hostos.machine import process

# Linux with CONFIG_SCHED_AUTOGROUP, as distributions have it.
AUTOGROUP = Path("/proc/self/autogroup")

PROGRAM = """
import os, sys, time
from pathlib import Path
from hostos.machine import process
os.setsid()
process.lowest_priority()
child = process.spawn(["sleep", "30"], Path(sys.argv[1]))
try:
    for pid in (os.getpid(), child.pid):
        print(Path(f"/proc/{pid}/autogroup").read_text().split()[2], os.getpriority(os.PRIO_PROCESS, pid))
finally:
    child.signal(9)
"""


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel does not group tasks by session")
def test_what_a_nice_process_starts_in_a_session_of_its_own_is_as_nice(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "log")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["19", "19", "19", "19"], done.stderr


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "60"])
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def test_the_start_of_a_process_is_its_own(sleeper: subprocess.Popen[bytes]) -> None:
    first = process.start_of(sleeper.pid)
    assert first == process.start_of(sleeper.pid)
    assert first != process.start_of(os.getpid())
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(psutil.NoSuchProcess):
        process.start_of(sleeper.pid)


def test_the_start_of_a_process_where_there_is_no_proc(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    first = process.start_of(sleeper.pid)
    # "Mon Nov 30 06:02:33 2026"
    assert len(first.split()) == 5
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert process.start_of(sleeper.pid) == first
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(psutil.NoSuchProcess):
        process.start_of(sleeper.pid)
