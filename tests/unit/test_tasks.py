"""What every invoke task is wrapped in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
from invoke.exceptions import Exit
from hostos.build.run import run
from tasks import user_errors

@user_errors
def task():
    run(["sh", "-c", f"echo $$ > {sys.argv[1]}.part; mv {sys.argv[1]}.part {sys.argv[1]}; exec sleep 600"])

try:
    task()
except Exit as ended:
    sys.exit(ended.code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_a_task_started_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    """A compiler that went on after its terminal was closed would meet that of the next build."""
    file = tmp_path / "pid"
    task = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, file],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        # In a job of a shell's background SIGINT would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(file.exists)
        task.send_signal(number)
        assert task.wait(60) == 130
    finally:
        task.kill()
    started = Path("/proc", file.read_text().strip())
    wait_for(lambda: not started.exists())


def wait_for(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)
