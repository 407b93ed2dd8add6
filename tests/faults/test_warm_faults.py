"""What goes wrong with templates, clones and suspended machines, and what becomes of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.fault

CLONE_STAGES = ["template loaded", "identity taken", "SSH answers", "key accepted"]
MEMORY = "192"

# Holds `hostos` in the stage called STAGE until the file GO appears.
HOLD = """
import contextlib, os, sys, time
from hostos import steps
real = steps.Steps.step
@contextlib.contextmanager
def step(self, name):
    with real(self, name) as running:
        if name == {stage!r}:
            print("HELD", file=sys.stderr, flush=True)
            while not os.path.exists({go!r}):
                time.sleep(0.02)
        yield running
steps.Steps.step = step
"""


def in_process(hostos: Any, prelude: str) -> None:
    """Runs `hostos` with some of its insides changed."""
    program = f"from hostos.cli import main\n{prelude}\nmain()\n"
    hostos.words = lambda *words: [sys.executable, "-c", program, *map(str, words)]


class Held:
    """A `hostos` command that waits in the middle of a stage."""

    def __init__(self, hostos: Any, stage: str, *words: str | Path) -> None:
        self.go = hostos.home.parent / "go"
        before = hostos.words
        in_process(hostos, HOLD.format(stage=stage, go=str(self.go)))
        self.process = hostos.start(*words)
        hostos.words = before
        self.said = b""
        while b"HELD" not in self.said:
            line = self.process.stderr.readline()
            assert line, self.said.decode()
            self.said += line

    def finish(self) -> tuple[int, str]:
        self.go.touch()
        _, err = self.process.communicate(timeout=240)
        self.go.unlink()
        return self.process.returncode, (self.said + err).decode()


@pytest.fixture
def cloning(hostos: Any) -> Any:
    """A home with a template, and nothing else."""
    hostos("template", "bake", "--os", hostos.os_dir, "--memory", MEMORY).ok()
    hostos.environment["HOSTOS_TEMPLATES"] = "auto"
    return hostos


def up(hostos: Any, *words: str) -> Any:
    return hostos.up("--accel", "tcg", "--memory", MEMORY, *words)


def template_of(hostos: Any) -> Path:
    (found,) = hostos("template", "ls", "--json").json()
    return Path(found["directory"])


def nothing_left(hostos: Any) -> None:
    assert hostos.qemus() == []
    assert list((hostos.home / "run").rglob("*.sock")) == []
    assert not list((hostos.home / "state").rglob("qemu.pid"))
    assert not list((hostos.home / "cache").rglob("*.part"))


def test_a_damaged_template_is_booted_around_and_not_tried_again(cloning: Any) -> None:
    state = template_of(cloning) / "state"
    data = state.read_bytes()
    state.chmod(0o600)
    state.write_bytes(data[: len(data) // 2])
    first = up(cloning, "--json")
    facts = first.json()
    assert "booting instead" in first.err
    assert facts["state"] == "running"
    assert facts["template"] is None
    assert len(cloning.qemus()) == 1
    cloning("kill").ok()
    second = up(cloning, "--json")
    assert second.json()["template"] is None
    assert "booting instead" not in second.err
    cloning("kill").ok()
    third = up(cloning, "--warm", "--json")
    assert third.json()["template"] == template_of(cloning).name
    cloning("kill").ok()
    nothing_left(cloning)


def test_a_clone_that_stays_silent_is_booted(cloning: Any) -> None:
    """The guest is told something it does not understand, so it does not answer."""
    before = cloning.words
    in_process(cloning, "from hostos.machine import clone\nclone.Person.script = lambda self: b'who are you\\n'")
    done = up(cloning, "--json")
    assert done.json()["template"] is None
    assert "did not take on its identity within" in done.err
    assert (template_of(cloning) / "failed").exists()
    cloning.words = before
    cloning("kill").ok()
    nothing_left(cloning)


@pytest.mark.parametrize("stage", CLONE_STAGES)
def test_qemu_is_killed_while_it_is_a_clone(cloning: Any, stage: str) -> None:
    held = Held(cloning, stage, "up", "--os", cloning.os_dir, "--accel", "tcg", "--memory", MEMORY)
    (pid,) = cloning.qemus()
    os.kill(pid, signal.SIGKILL)
    status, err = held.finish()
    assert status == 1, err
    assert "killed by signal 9" in err
    assert not (template_of(cloning) / "failed").exists()
    nothing_left(cloning)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("stage", CLONE_STAGES)
def test_the_launcher_of_a_clone_is_ended(cloning: Any, stage: str, number: signal.Signals) -> None:
    held = Held(cloning, stage, "up", "--os", cloning.os_dir, "--accel", "tcg", "--memory", MEMORY)
    held.process.send_signal(number)
    status, _ = held.finish()
    if number is signal.SIGKILL:
        assert cloning("status", "--json").json()["state"] == "interrupted"
    else:
        assert status == 130
        nothing_left(cloning)
    assert up(cloning, "--json").json()["template"] == template_of(cloning).name
    assert len(cloning.qemus()) == 1
    cloning("kill").ok()
    nothing_left(cloning)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("stage", ["template booted", "template saved"])
def test_an_interrupted_bake_leaves_no_template(hostos: Any, stage: str, number: signal.Signals) -> None:
    bake = ("template", "bake", "--os", hostos.os_dir, "--memory", MEMORY)
    held = Held(hostos, stage, *bake)
    held.process.send_signal(number)
    held.finish()
    assert hostos("template", "ls", "--json").json() == []
    if number is not signal.SIGKILL:
        nothing_left(hostos)
    hostos(*bake).ok()
    assert len(hostos("template", "ls", "--json").json()) == 1
    nothing_left(hostos)


def test_two_that_make_the_same_template(hostos: Any) -> None:
    both = [hostos.start("template", "bake", "--os", hostos.os_dir, "--memory", MEMORY) for _ in range(2)]
    printed = [each.communicate(timeout=240) for each in both]
    assert [each.returncode for each in both] == [0, 0], printed
    assert printed[0][0] == printed[1][0]
    assert sum(b"template saved" in err for _, err in printed) == 1


def test_a_published_port_that_is_taken_is_not_the_templates_fault(cloning: Any) -> None:
    """Somebody takes the SSH port right before QEMU does."""
    take = """
import socket
from hostos.machine import start
holders = []
def spawn(command, log, real=start.spawn):
    if not holders:
        forwards = command[command.index("-netdev") + 1]
        port = int(forwards.split("hostfwd=tcp:127.0.0.1:")[1].split("-")[0])
        holders.append(socket.create_server(("127.0.0.1", port)))
    return real(command, log)
start.spawn = spawn
"""
    before = cloning.words
    in_process(cloning, take)
    done = up(cloning, "--json")
    cloning.words = before
    assert done.json()["template"] == template_of(cloning).name, done.err
    assert done.err.count("was taken meanwhile: choosing another") == 1
    cloning("kill").ok()


def test_the_cache_directory_cannot_be_written(hostos: Any) -> None:
    """Templates are a convenience: without room for them machines boot."""
    hostos.environment["HOSTOS_TEMPLATES"] = "auto"
    hostos.home.mkdir()
    (hostos.home / "cache").write_text("in the way")
    assert up(hostos, "--json").json()["state"] == "running"
    refused = up(hostos, "-m", "other", "--warm")
    assert refused.status in (1, 2)
    assert "Traceback" not in refused.err
    hostos("kill").ok()


# Suspended machines --------------------------------------------------------------------------


@pytest.fixture
def working(cloning: Any) -> Any:
    """A machine with something to lose."""
    up(cloning).ok()
    cloning("ssh", "--", "echo precious > /run/kept").ok()
    return cloning


def kept(hostos: Any) -> bool:
    return bool(hostos("ssh", "--", "cat", "/run/kept").ok().out == "precious\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_suspend_lets_the_machine_run(working: Any, number: signal.Signals) -> None:
    held = Held(working, "saved", "suspend")
    held.process.send_signal(number)
    status, err = held.finish()
    assert status == 130, err
    assert working("status", "--json").json()["state"] == "running"
    assert not (working.directory() / "saved.part").exists()
    assert kept(working)


def test_suspend_is_killed_half_way(working: Any) -> None:
    held = Held(working, "saved", "suspend")
    held.process.kill()
    held.finish()
    facts = working("status", "--json").json()
    assert facts["state"] == "suspended"
    assert "interrupted" in facts["reason"]
    working("resume").ok()
    assert working("status", "--json").json()["state"] == "running"
    assert kept(working)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("stage", ["state loaded", "clock set"])
def test_an_interrupted_resume_can_be_repeated(working: Any, stage: str, number: signal.Signals) -> None:
    working("suspend").ok()
    held = Held(working, stage, "resume")
    held.process.send_signal(number)
    held.finish()
    assert working("status", "--json").json()["state"] == "suspended"
    working("resume").ok()
    assert kept(working)
    assert len(working.qemus()) == 1


def test_a_damaged_state_is_kept_until_it_is_given_up(working: Any) -> None:
    working("suspend").ok()
    state = working.directory() / "saved" / "state"
    data = state.read_bytes()
    state.write_bytes(data[: len(data) // 2])
    for command in (("resume",), ("up",)):
        failed = working(*command)
        assert failed.status == 1
        assert "hostos up --cold" in failed.err
        assert state.exists()
        assert working.qemus() == []
    assert "is discarded" in working("up", "--cold").ok().err
    assert working("ssh", "--", "test ! -e /run/kept").status == 0
    assert not state.exists()


def test_no_room_to_suspend(hostos: Any) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to mount a small file system")
    hostos.home.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90M", "none", hostos.home], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount here")
    try:
        up(hostos).ok()
        refused = hostos("suspend")
        assert refused.status == 2
        assert "make room" in refused.err
        assert hostos("status", "--json").json()["state"] == "running"
        hostos("kill").ok()
    finally:
        hostos.clean_up()
        with contextlib.suppress(subprocess.SubprocessError):
            time.sleep(0.5)
            subprocess.run(["umount", "-l", hostos.home], check=True)


def test_what_was_saved_can_be_given_up_and_all_of_the_machine(working: Any) -> None:
    working("suspend", "default").ok()
    cold = working("up", "--cold").ok()
    assert "is discarded" in cold.err
    assert working("ssh", "--", "test ! -e /run/kept").status == 0
    pid = working("status", "--json").json()["pid"]
    working("restart").ok()
    assert working("status", "--json").json()["pid"] != pid
    assert working("rm", "default").status == 2
    working("rm", "--force", "default").ok()
    assert working.qemus() == []
    assert working("ls", "--json").json() == []
    assert list((working.home / "state" / "machines").iterdir()) == []
    assert list((working.home / "run" / "m").iterdir()) == []


@pytest.mark.parametrize("name", ["a place with spaces, and a comma", "x" * 120], ids=["spaces", "long"])
def test_in_places_with_odd_names(os_dir: Path, hostos: Any, name: str) -> None:
    """Templates, clones and saved machines; sockets of long ones move to a short private directory."""
    odd = type(hostos)(hostos.home.parent / name, os_dir)
    try:
        assert up(odd, "--warm", "--json").json()["template"]
        odd("ssh", "--", "echo precious > /run/kept").ok()
        odd("suspend").ok()
        odd("up").ok()
        assert kept(odd)
        odd("rm", "--force", "default").ok()
        assert odd.qemus() == []
    finally:
        odd.clean_up()
        for path in Path(tempfile.gettempdir()).glob(f"hostos-{os.getuid()}-*"):
            with contextlib.suppress(OSError):
                for each in ("m", "t"):
                    (path / each).rmdir()
                path.rmdir()
