"""The build cache when several builds use it at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hostos.build import cache
from hostos.errors import UserError
from hostos.steps import Event, Step

HOLDER = """
import sys
from hostos.build import cache
from hostos.steps import Step
with cache.alone("kernel", Step("held", lambda event: None)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Another process that works on the kernel."""
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_build_waits_for_another_and_says_so(holder):
    said = []

    def tell(event: Event) -> None:
        said.append(event.detail)
        # Ends the other one's work, so that the wait is over.
        if holder.stdin:
            holder.stdin.close()
            holder.stdin = None

    with cache.alone("kernel", Step("kernel", tell)):
        assert holder.wait(20) == 0
    assert said[0] == "waiting: another build works on the kernel"


def test_other_parts_are_not_waited_for(holder):
    with cache.alone("packages", Step("packages", pytest.fail)):
        assert holder.poll() is None


def test_it_does_not_wait_for_ever(holder, monkeypatch):
    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="another build works on the kernel"):
        with cache.alone("kernel", Step("kernel", lambda event: None)):
            pytest.fail("it was held")
