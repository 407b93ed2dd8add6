from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
