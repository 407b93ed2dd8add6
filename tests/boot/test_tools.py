"""Doctor, ssh, cp, console and the like, on a real guest."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import socket
import subprocess
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hostos.machine import accel, os_image

pytestmark = [
    pytest.mark.boot,
    pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs the OpenSSH client"),
]


def test_doctor_proves_what_it_says(session_hostos: Any) -> None:
    done = session_hostos("doctor", "--json", "--os", session_hostos.os_dir)
    found = {finding["name"]: finding for finding in json.loads(done.out)["findings"]}
    assert done.status == 0, done.out
    assert found["TCG"]["says"] == "proven: a guest ran"
    assert found["OS"]["level"] == "ok"
    memory = session_hostos.home / "cache" / "accelerator.json"
    if "no guest runs" in found["KVM"]["says"]:
        # The device promises it all; what was found out is what the next start goes by.
        assert "never runs" in json.loads(memory.read_text())["kvm_fault"]
        return
    assert not memory.exists()
    if session_hostos.arch != os_image.host_arch():
        assert f"cannot run {session_hostos.arch} guests" in found["KVM"]["says"]
    else:
        assert accel.kvm_device_fault() or "proven" in found["KVM"]["says"] or "works" in found["KVM"]["says"]


@dataclass
class OnTerminal:
    """A command on a terminal of its own; `shown` is what it has printed so far."""

    process: subprocess.Popen[bytes]
    parent: int
    shown: bytes = b""

    def read_until(self, text: bytes, seconds: float = 90.0) -> None:
        give_up = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < give_up, self.shown
            if select.select([self.parent], [], [], 0.5)[0]:
                self.shown += os.read(self.parent, 4096)

    def type(self, text: bytes) -> None:
        os.write(self.parent, text)


@contextlib.contextmanager
def on_terminal(hostos: Any, *words: str) -> Iterator[OnTerminal]:
    parent, child = pty.openpty()
    before = termios.tcgetattr(child)
    process = subprocess.Popen(
        hostos.words(*words), stdin=child, stdout=child, stderr=child, env=hostos.env(), start_new_session=True
    )
    try:
        yield OnTerminal(process, parent)
        # However it ended, the terminal is as it was.
        assert termios.tcgetattr(child) == before
    finally:
        process.kill()
        process.wait()
        os.close(parent)
        os.close(child)


@pytest.fixture(scope="module")
def locked_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The public half of a key with a passphrase."""
    private = tmp_path_factory.mktemp("locked") / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", private], check=True)
    return private.with_name("id.pub")


@pytest.fixture(scope="module")
def machine(session_hostos: Any, locked_key: Path) -> Iterator[Any]:
    """A machine whose user has a key with a passphrase, and an agent that never answers."""
    directory = session_hostos.home.parent
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(directory / "agent"))
        deaf.listen()
        environment = {"SSH_AUTH_SOCK": str(directory / "agent"), "SSH_ASKPASS": "/bin/false"}
        hostos = type(session_hostos)(session_hostos.home, session_hostos.os_dir, environment=environment)
        try:
            _start_and_watch(hostos, locked_key)
            yield hostos
        finally:
            hostos("kill", "-m", "tools")
            for child in hostos.started:
                child.kill()
                child.communicate()


def _start_and_watch(hostos: Any, key: Path) -> None:
    """The console works from the first byte on, while `up` waits for the guest."""
    up = hostos.start("-q", "up", "--os", hostos.os_dir, "-m", "tools", "--key", key, "--json",
                      "--timeline", hostos.home.parent / "timeline.json")  # fmt: skip
    events: list[dict[str, Any]] = []
    while not events or (events[-1]["kind"], events[-1].get("step")) != ("done", "QEMU started"):
        line = up.stdout.readline()
        assert line
        events.append(json.loads(line))
    with on_terminal(hostos, "console", "-m", "tools") as console:
        console.read_until(b"systemd")
        console.type(b"\x1d")
        console.read_until(b"detached")
        assert console.process.wait(20) == 0
    out, err = up.communicate(timeout=240)
    assert up.returncode == 0, err
    # -q: nothing but warnings. The events tell the rest, the last one what came of it.
    assert all(line.startswith(b"warning: ") for line in err.splitlines()), err
    events += [json.loads(line) for line in out.splitlines()]
    assert [event["step"] for event in events if event["kind"] == "done"] == [
        stage["name"] for stage in events[-1]["stages"]
    ]
    assert (events[-1]["kind"], events[-1]["state"]) == ("result", "running")
    assert {event["schema"] for event in events} == {1}


def test_where_the_time_went(machine: Any) -> None:
    drawn = json.loads((machine.home.parent / "timeline.json").read_text())
    spans = {(span["kind"], span["name"]): span for span in drawn["spans"]}
    host = {name: span for (kind, name), span in spans.items() if kind == "host"}
    linux, sshd = spans["kernel", "Linux"], spans["unit", "ssh.service"]
    assert list(host)[:2] == ["hostos itself", "QEMU started"]
    # Two clocks, one picture: the guest's is placed between what the host saw.
    assert (
        host["QEMU started"]["start"] < linux["start"] < linux["end"] < sshd["end"] < host["SSH answers"]["end"] + 0.5
    )
    assert spans["manager", "systemd"]["start"] == pytest.approx(linux["end"], abs=0.01)
    assert len([span for span in drawn["spans"] if span["kind"] == "unit"]) > 10
    refused = machine("up", "-m", "x", "--timeline", "/absent/out.svg")
    assert (refused.status, "is no directory" in refused.err) == (2, True)


def test_ssh_takes_its_own_options(machine: Any) -> None:
    done = machine("ssh", "-m", "tools", "-T", "-o", "SetEnv=LC_X=1", "--", "cat; exit 42", input="piped")
    assert (done.status, done.out) == (42, "piped")
    assert machine("ssh", "-m", "tools", "echo", "a  b", "-x").ok().out == "a  b -x\n"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    words = ("-L", f"{port}:127.0.0.1:22", "-o", "ExitOnForwardFailure=yes")
    background = machine.start("ssh", "-m", "tools", *words, "--", "echo up; exec sleep 60")
    assert background.stdout.readline() == b"up\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        assert client.recv(4) == b"SSH-"
    background.kill()
    background.communicate()


def test_a_port_of_the_guest_leads_here(machine: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        forward = f"4001:127.0.0.1:{server.getsockname()[1]}"
        child = machine.start("ssh", "-m", "tools", "-R", forward, "--", "echo hello | socat -u - TCP:127.0.0.1:4001")
        with server.accept()[0] as peer, peer.makefile() as stream:
            assert stream.readline() == "hello\n"
        child.communicate(timeout=30)


def test_the_agent_is_forwarded_when_asked_and_never_needed(machine: Any, tmp_path: Path) -> None:
    """The agent of the environment is deaf and the user's key locked: nothing waits for them."""
    assert machine("ssh", "-m", "tools", "--", "echo ${SSH_AUTH_SOCK:-none}", timeout=30).ok().out == "none\n"
    assert machine("run", "-m", "tools", "--", "true", timeout=30).status == 0
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "mine", "-f", tmp_path / "k"], check=True)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", machine.home.parent / "a2"], stdout=subprocess.DEVNULL)
    try:
        while not (machine.home.parent / "a2").exists():
            time.sleep(0.02)
        environment = machine.env() | {"SSH_AUTH_SOCK": str(machine.home.parent / "a2")}
        subprocess.run(["ssh-add", "-q", tmp_path / "k"], env=environment, check=True)
        # SSH_AGENTC_REQUEST_IDENTITIES of the agent protocol.
        ask = "s = socket.socket(socket.AF_UNIX); s.connect(os.environ['SSH_AUTH_SOCK'])"
        ask = f"import os, socket; {ask}; s.sendall(bytes([0, 0, 0, 1, 11])); print(s.recv(999))"
        command = machine.words("ssh", "-A", "-m", "tools", "--", "python3", "-c", ask)
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
        assert b"mine" in done.stdout, done.stderr
    finally:
        agent.kill()
        agent.wait()


def test_copies_there_and_back(machine: Any, tmp_path: Path) -> None:
    tree = tmp_path / "a tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "colon:name").write_bytes(os.urandom(300_000))
    (tree / "é 'x'").write_text("hi")
    (tree / "run").write_text("#!/bin/sh\n")
    (tree / "run").chmod(0o750)
    cp = ("cp", "-m", "tools")
    machine(*cp, "-r", "-p", tree, ":/root/").ok()
    machine(*cp, "-r", "-p", "tools:/root/a tree", tmp_path / "back").ok()

    def content(directory: Path) -> dict[str, tuple[bytes, int]]:
        files = [path for path in directory.rglob("*") if path.is_file()]
        return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mode) for path in files}

    assert content(tmp_path / "back") == content(tree)
    machine(*cp, ":/etc/host*me", tmp_path).ok()
    assert (tmp_path / "hostname").read_text() == "tools\n"
    machine("cp", "tools:/root/a tree/run", "tools:/tmp/run2").ok()
    assert machine("ssh", "-m", "tools", "--", "cat /tmp/run2").ok().out == "#!/bin/sh\n"
    failed = machine(*cp, ":/no/such/file", tmp_path)
    assert failed.status == 1
    assert "No such file" in failed.err
    assert machine(*cp, tmp_path / "absent", ":").status == 2


def test_every_ssh_program_knows_the_machines(machine: Any, tmp_path: Path) -> None:
    config = machine("ssh-config", "--path").ok().out.strip()
    done = subprocess.run(["ssh", "-F", config, "hostos-tools", "hostname"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "tools\n", done.stderr
    # As VS Code does: the user's own configuration.
    machine.environment["HOME"] = str(tmp_path)
    try:
        machine("ssh-config", "--install").ok()
    finally:
        del machine.environment["HOME"]
    config = str(tmp_path / ".ssh" / "config")
    done = subprocess.run(
        ["sftp", "-F", config, "-b", "-", "hostos-tools"], input=b"ls /etc/hostname\n", capture_output=True
    )
    assert b"/etc/hostname" in done.stdout, done.stderr


def test_the_console(machine: Any) -> None:
    with on_terminal(machine, "console", "-m", "tools", "--detach-key", "ctrl-o") as console:
        console.read_until(b"ctrl-o leaves")
        console.type(b"\r")
        console.read_until(b"# ")
        console.type(b"echo $((6*7))-$(hostname)\r")
        console.read_until(b"42-tools")
        # Ctrl-C is the guest's, Ctrl-] too: another key was chosen.
        console.type(b"sleep 99; echo $((40+3))-$?\r")
        time.sleep(0.5)
        console.type(b"\x03\x1d\x15")
        console.type(b"echo $((40+4))\r")
        console.read_until(b"44")
        second = machine("console", "-m", "tools")
        assert (second.status, "needs a terminal" in second.err) == (2, True)
        with on_terminal(machine, "console", "-m", "tools") as other:
            other.read_until(b"is in use (process %d)" % console.process.pid)
            assert other.process.wait(20) == 2
        console.type(b"\x0f")
        console.read_until(b"detached")
        assert console.process.wait(20) == 0


def test_logs_are_followed_to_the_end_of_the_machine(machine: Any) -> None:
    """Last: it ends the machine."""
    assert len(machine("logs", "-m", "tools", "-n", "2").ok().out.splitlines()) == 2
    assert "sshd" in machine("logs", "-m", "tools", "--journal", "-n", "5", "--", "-u", "ssh").ok().out
    assert machine("logs", "-m", "tools", "--", "-u").status == 2
    serial = machine.start("logs", "-m", "tools", "-f")
    journal = machine.start("logs", "-m", "tools", "--journal", "-f", "-n", "1")
    assert journal.stdout.readline()
    with on_terminal(machine, "console", "-m", "tools") as console:
        console.read_until(b"leaves")
        machine("down", "-m", "tools").ok()
        console.read_until(b"has ended")
        assert console.process.wait(20) == 0
    out, _ = serial.communicate(timeout=30)
    assert b"reboot: Power down" in out
    assert serial.returncode == 0
    _, err = journal.communicate(timeout=60)
    assert (journal.returncode, b"Traceback" in err) == (0, False), err
    assert machine("logs", "-m", "tools").ok().out.encode() == out
    refused = machine("ssh", "-m", "tools", "-A", "--", "true")
    assert (refused.status, "hostos up -m tools" in refused.err) == (2, True)


def test_a_dry_run_runs_as_printed(session_hostos: Any, tmp_path: Path) -> None:
    """sh takes it as it is, and its guest is the machine: same keys, same host key, same ports."""
    hostos = type(session_hostos)(session_hostos.home, session_hostos.os_dir)
    script = hostos.up("-m", "manual", "--memory", "256", "--accel", "tcg", "--dry-run").ok().out
    assert hostos.directory("manual").is_dir()
    assert hostos("status", "-m", "manual").ok().out == "stopped\n"
    qemu = subprocess.Popen(["sh", "-c", script], stdin=subprocess.DEVNULL, cwd=tmp_path)
    try:
        ssh = ["ssh", "-F", hostos.directory("manual") / "ssh_config", "-o", "ConnectTimeout=5", "hostos-manual"]
        give_up = time.monotonic() + 120
        while (done := subprocess.run([*ssh, "hostname"], capture_output=True)).returncode:
            assert time.monotonic() < give_up, done.stderr
            time.sleep(0.5)
        assert done.stdout == b"manual\n"
        assert hostos("down", "-m", "manual", "--json").json()["clean"] is True
        assert qemu.wait(20) == 0
    finally:
        qemu.kill()
        qemu.wait()


def test_a_start_that_fails_says_so_in_its_last_event(session_hostos: Any) -> None:
    failed = session_hostos("up", "-m", "none", "--os", "/absent", "--json")
    assert failed.status == 2
    assert json.loads(failed.out) == {
        "schema": 1,
        "kind": "error",
        "message": "OS directory /absent does not exist",
        "hint": "build it: invoke build (or name one: --os DIR)",
        "status": 2,
    }
