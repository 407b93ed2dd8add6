"""An interrupt at any moment of a monitor connection, to a real QEMU."""

from __future__ import annotations

import gc
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostos.machine.monitor import connect

ROUNDS = 300
pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]


@pytest.fixture
def monitor() -> Iterator[Path]:
    qemu = shutil.which("qemu-system-x86_64")
    if not qemu:
        pytest.skip("qemu-system-x86_64 is not installed")
    # A socket's path has a limited length.
    with tempfile.TemporaryDirectory(prefix="h-") as directory:
        path = Path(directory, "qmp")
        words = [qemu, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off"]
        process = subprocess.Popen(words)
        try:
            give_up = time.monotonic() + 30
            while not path.exists():
                assert time.monotonic() < give_up
                time.sleep(0.01)
            yield path
        finally:
            process.kill()
            process.wait()


def test_an_interrupt_leaves_nothing_half_done(monitor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread, no coroutine nobody awaited, no exception nobody took; and QEMU takes the next client."""
    forgotten: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", forgotten.append)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    threads = threading.active_count()
    interrupted = 0
    began = time.monotonic()
    for _ in range(20):
        with connect(monitor, lambda: True, timeout=10) as talk:
            talk.execute("query-status")
    usual = (time.monotonic() - began) / 20

    def attempt(seconds: float) -> None:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with connect(monitor, lambda: True, timeout=10) as talk:
                talk.execute("query-status")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    try:
        for number in range(ROUNDS):
            try:
                attempt(usual * (number + 1) / ROUNDS)
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > ROUNDS / 4
    give_up = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < give_up:
        time.sleep(0.01)
    assert threading.active_count() == threads
    gc.collect()
    # Python's own: it hit a destructor.
    assert not [each for each in forgotten if each.exc_type is not KeyboardInterrupt]
    with connect(monitor, lambda: True, timeout=10) as talk:
        assert "status" in talk.execute("query-status")
