"""State, locks and processes, with a real QEMU that is never let run a guest."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from hostos.errors import UserError
from hostos.machine import launcher, lock, monitor, process, stop
from hostos.machine.instance import Instance, Run, all_instances, monitor_answers
from hostos.paths import runtime_dir
from hostos.steps import Steps

needs_qemu = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed")


@pytest.fixture
def instance() -> Instance:
    made = Instance.named("box")
    made.make_directory()
    made.make_socket_dir()
    return made


def qemu_command(instance: Instance) -> list[str]:
    return [
        *[
            "qemu-system-x86_64",
            "-S",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-accel",
            "tcg",
            "-m",
            "16",
        ],
        *["-qmp", f"unix:{instance.monitor_socket},server=on,wait=off", "-pidfile", str(instance.pid_file)],
    ]


@pytest.fixture
def qemu(instance: Instance) -> Iterator[process.QemuProcess]:
    started = process.spawn(qemu_command(instance), instance.qemu_log)
    try:
        with monitor.connect(instance.monitor_socket, started.alive, timeout=20.0) as qmp:
            assert qmp.execute("query-status")["status"] == "prelaunch"
        yield started
    finally:
        started.signal(signal.SIGKILL)
        assert started.wait(10.0)


def record(started: process.QemuProcess, ready_at: float | None) -> Run:
    return Run(
        started.pid, started.start, time.time(), "box", 1, 2, "tcg", "", 1, 16, "/os", "6.12", [], ready_at=ready_at
    )


def test_a_machine_that_never_was() -> None:
    with pytest.raises(UserError, match="no machine 'box'") as caught:
        Instance.load("box")
    assert "hostos up -m box" in caught.value.hint
    assert all_instances() == []


@needs_qemu
def test_state_is_found_out(instance: Instance, qemu: process.QemuProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    assert instance.state()[0] == "interrupted"
    instance.write_run(record(qemu, None))
    assert instance.state()[0] == "interrupted"
    instance.write_run(record(qemu, time.time()))
    assert instance.state() == ("running", "")
    assert instance.alive()
    # Another QEMU's record does not count.
    other = record(qemu, time.time())
    instance.write_run(Run(**{**vars(other), "process_start": "another boot/1"}))
    assert instance.state()[0] == "interrupted"
    with pytest.raises(UserError, match="it is interrupted"):
        instance.require_running()
    # Its start is no time of day: those move when the clock is set (psutil takes /proc/stat's boot time for them).
    instance.write_run(record(qemu, time.time()))
    with monkeypatch.context() as clock:
        before = psutil.Process(qemu.pid).create_time()
        clock.setattr(psutil._pslinux, "boot_time", lambda: 1.0)
        assert psutil.Process(qemu.pid).create_time() < before - 86400
        clock.setattr(time, "time", lambda real=time.time: real() + 86400 * 365)
        assert instance.state() == ("running", "")
        found = instance.process()
        assert found is not None
        assert found.start == qemu.start
        assert 0 <= found.age_seconds() < 600
    instance.run_file.write_text("{")
    assert instance.state()[0] == "broken"
    qemu.signal(signal.SIGSTOP)
    instance.write_run(record(qemu, time.time()))
    assert not monitor_answers(instance.monitor_socket, timeout=0.2)
    qemu.signal(signal.SIGCONT)
    qemu.signal(signal.SIGKILL)
    assert qemu.wait(10.0)
    assert instance.state() == ("stopped", "")


@needs_qemu
def test_many_may_ask_at_once(instance: Instance, qemu: process.QemuProcess) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: monitor_answers(instance.monitor_socket, timeout=20.0), range(60)))
    assert all(answers)


@needs_qemu
def test_a_reused_pid_is_not_taken_for_the_machine(instance: Instance, qemu: process.QemuProcess) -> None:
    other = Instance.named("other")
    other.make_directory()
    other.make_socket_dir()
    # The pid is alive and even a QEMU's, but its command line names another pid file.
    other.pid_file.write_text(str(qemu.pid))
    assert other.process() is None
    other.pid_file.write_text(str(os.getpid()))
    assert other.process() is None
    other.pid_file.write_text("nonsense")
    assert other.process() is None
    found = instance.process()
    assert found is not None
    assert found.pid == qemu.pid


@needs_qemu
def test_a_process_without_a_pid_file_is_found_and_ended(instance: Instance, qemu: process.QemuProcess) -> None:
    instance.pid_file.unlink()
    assert instance.process() is None
    assert stop.end(instance) == [qemu.pid]
    assert not qemu.alive()
    assert not instance.socket_dir.exists()


@needs_qemu
def test_the_power_down_ladder_ends_what_does_not_listen(instance: Instance, qemu: process.QemuProcess) -> None:
    """No guest runs: SSH and the power button are of no use, the monitor's quit is."""
    instance.write_run(record(qemu, time.time()))
    steps = Steps()
    stopped = stop.stop(instance, qemu, steps, timeout=0.3)
    assert (stopped.how, stopped.clean) == ("monitor quit", False)
    assert [step.name for step in steps.finished] == ["power off over SSH", "power button", "monitor quit"]
    assert qemu.exit_status() == 0


@needs_qemu
def test_a_stopped_qemu_is_killed(
    instance: Instance, qemu: process.QemuProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance.write_run(record(qemu, time.time()))
    qemu.signal(signal.SIGSTOP)
    assert launcher.kill("box") == [qemu.pid]
    with pytest.raises(UserError, match="is not running"):
        launcher.kill("box")
    with pytest.raises(UserError, match="is not running"):
        launcher.down("box", Steps())


@needs_qemu
def test_the_monitor_notices_that_qemu_is_gone(instance: Instance, qemu: process.QemuProcess) -> None:
    with monitor.connect(instance.monitor_socket, qemu.alive, timeout=10.0) as qmp:
        assert qmp.wait_event({"SHUTDOWN"}, 0.1) is None
        with pytest.raises(monitor.MonitorError, match="no-such-command"):
            qmp.execute("no-such-command")
        qemu.signal(signal.SIGKILL)
        with pytest.raises(monitor.QemuGone):
            qmp.wait_event({"SHUTDOWN"}, 30.0)


def test_a_monitor_that_never_comes(tmp_path: Path) -> None:
    began = time.monotonic()
    with (
        pytest.raises(monitor.MonitorError, match="no answer"),
        monitor.connect(tmp_path / "s", lambda: True, timeout=0.3),
    ):
        pass
    with pytest.raises(monitor.QemuGone), monitor.connect(tmp_path / "s", lambda: False, timeout=30.0):
        pass
    assert time.monotonic() - began < 5


def test_what_listens_but_is_no_qemu_does_not_answer(tmp_path: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        assert not monitor_answers(tmp_path / "s", timeout=0.1)


HOLD = """
import sys, time
from pathlib import Path
from hostos.machine.lock import locked
with locked(Path(sys.argv[1]), "box", "up"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_command_at_a_time_and_the_other_is_named(instance: Instance) -> None:
    assert lock.holder(instance.lock_file) is None
    with subprocess.Popen([sys.executable, "-c", HOLD, instance.lock_file], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert lock.holder(instance.lock_file) == lock.Holder("up", other.pid)
        assert instance.state() == ("starting", f"hostos up, process {other.pid}")
        with pytest.raises(UserError, match=f"busy: hostos up \\(process {other.pid}\\)"):
            with lock.locked(instance.lock_file, "box", "down"):
                pass
        other.kill()
    # Nothing of a killed holder stays in the way.
    assert lock.holder(instance.lock_file) is None
    with lock.locked(instance.lock_file, "box", "down"):
        assert instance.state()[0] == "stopping"
    assert instance.state()[0] == "stopped"


def test_directories_are_private(instance: Instance) -> None:
    for path in (instance.directory, instance.socket_dir, runtime_dir()):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_socket_directory_of_somebody_else_is_refused(instance: Instance) -> None:
    os.chown(instance.socket_dir, 12345, 12345)
    with pytest.raises(UserError, match="belongs to somebody else"):
        instance.make_socket_dir()
