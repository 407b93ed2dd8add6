"""A real guest in a real QEMU, driven by the `hostos` command."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hostos.errors import UserError
from hostos.machine import accel, connection, os_image
from hostos.machine.identity import ensure_identity, ensure_key_pair
from hostos.machine.instance import Instance

pytestmark = [
    pytest.mark.boot,
    pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs the OpenSSH client"),
]

COMMENT = 'Ann "the key" O\'Hara # 1'


@dataclass(frozen=True)
class Booted:
    """A machine that is up."""

    hostos: Any
    name: str
    key: Path
    published: int
    facts: dict[str, Any]

    def ssh(self, *words: str) -> str:
        return str(self.hostos("ssh", "-m", self.name, "--", *words).ok().out)


@pytest.fixture(scope="module")
def booted(session_hostos: Any, keys: Callable[..., Path]) -> Iterator[Booted]:
    key = keys("user", comment=COMMENT)
    # As an editor on Windows leaves it.
    key.write_bytes(key.read_bytes().replace(b"\n", b"\r\n"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        published = probe.getsockname()[1]
    words = ["-m", "main", "--key", key, "--hostname", "guest1", "--publish", f"{published}:8000", "--json"]
    facts = session_hostos.up(*words).json()
    yield Booted(session_hostos, "main", key, published, facts)
    if session_hostos.qemus():
        session_hostos("kill", "-m", "main").ok()


@pytest.fixture
def guest(booted: Booted, monkeypatch: pytest.MonkeyPatch) -> Iterator[connection.Connection]:
    monkeypatch.setenv("HOSTOS_HOME", str(booted.hostos.home))
    with connection.connect(Instance.load("main"), deadline=60.0) as connected:
        yield connected


def test_it_is_ready_and_says_how_it_got_there(booted: Booted) -> None:
    facts = booted.facts
    assert facts["state"] == "running"
    assert facts["failed_units"] == []
    assert [stage["name"] for stage in facts["stages"]] == [
        "QEMU started",
        "monitor answers",
        "guest speaks",
        "SSH answers",
        "key accepted",
        "system is up",
    ]
    assert facts["accelerator"] in ("tcg", "kvm")
    assert facts["accelerator_reason"]


def test_the_system_is_sound(booted: Booted) -> None:
    assert booted.ssh("systemctl", "--failed", "--no-legend") == ""
    assert booted.ssh("systemctl", "is-system-running") == "running\n"
    assert booted.ssh("cat", "/proc/sys/kernel/tainted") == "0\n"
    journal = booted.hostos("logs", "-m", "main", "--journal").ok().out
    assert "Linux version" in journal
    assert "ordering cycle" not in journal
    assert "Initramfs unpacking failed" not in journal
    assert booted.ssh("cat", "/proc/1/comm") == "systemd\n"
    # Packed last: all of the initrd is there.
    assert booted.ssh("test -s /etc/hostos/complete && echo whole") == "whole\n"


def test_the_command_line_shows_the_contract(booted: Booted) -> None:
    line = booted.ssh("cat", "/proc/cmdline")
    tokens = dict(token.partition("=")[::2] for token in line.split())
    assert tokens["hostos.hostname"] == "guest1"
    encoded = tokens["hostos.ssh_key"]
    shown = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
    assert shown == booted.key.read_text().strip()
    assert shown.endswith(COMMENT)
    assert booted.ssh("hostname") == "guest1\n"


def test_exactly_the_two_keys_get_in(booted: Booted) -> None:
    control = (booted.hostos.directory("main") / "identity" / "control_ed25519.pub").read_text()
    authorized = booted.ssh("cat", "/root/.ssh/authorized_keys").splitlines()
    assert {line.split()[1] for line in authorized} == {control.split()[1], booted.key.read_text().split()[1]}
    assert booted.ssh("stat -c %a /root/.ssh /root/.ssh/authorized_keys").split() == ["700", "600"]


def plain_ssh(booted: Booted, *options: str, known: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The user's own ssh: nothing of ours but the pinned host key."""
    ssh = booted.facts["ssh"]
    known = known or booted.hostos.directory("main") / "identity" / "known_hosts"
    # fmt: off
    command = ["ssh", "-F", "/dev/null", "-o", f"UserKnownHostsFile={known}", "-o", "HostKeyAlias=hostos-main",
               "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-p", str(ssh["port"]), *options,
               f"root@{ssh['host']}", "echo in"]
    # fmt: on
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_the_users_key_gets_in_and_nothing_else(booted: Booted, keys: Callable[..., Path]) -> None:
    private = str(booted.key.with_suffix(""))
    assert plain_ssh(booted, "-i", private, "-o", "IdentitiesOnly=yes").stdout == "in\n"
    refused = plain_ssh(booted, "-o", "PubkeyAuthentication=no", "-o", "PreferredAuthentications=password")
    assert refused.returncode == 255
    assert "Permission denied (publickey)" in refused.stderr
    stranger = str(keys("stranger").with_suffix(""))
    assert "Permission denied (publickey)" in plain_ssh(booted, "-i", stranger, "-o", "IdentitiesOnly=yes").stderr


def test_the_host_key_is_the_one_made_before_the_first_contact(booted: Booted, tmp_path: Path) -> None:
    other = tmp_path / "known_hosts"
    other.write_text("hostos-main " + " ".join(ensure_key_pair(tmp_path / "other", "x").line.split()[:2]) + "\n")
    refused = plain_ssh(booted, known=other)
    assert refused.returncode == 255
    assert "Host key verification failed" in refused.stderr


def test_our_own_connection_insists_on_the_host_key_too(booted: Booted, tmp_path: Path) -> None:
    identity = ensure_identity(booted.hostos.directory("main") / "identity", "main")
    wrong = replace(identity, host=ensure_key_pair(tmp_path / "other", "x"))
    sock = socket.create_connection(("127.0.0.1", booted.facts["ssh"]["port"]))
    with pytest.raises(UserError, match="another host key"):
        connection.login(sock, wrong, 60.0)
    sock = socket.create_connection(("127.0.0.1", booted.facts["ssh"]["port"]))
    stranger = replace(identity, control=ensure_key_pair(tmp_path / "other", "x"))
    with pytest.raises(UserError, match="refuses the control key"):
        connection.login(sock, stranger, 60.0)


def test_both_streams_are_drained_and_words_arrive_as_they_are(guest: connection.Connection) -> None:
    script = "head -c 5000000 /dev/zero; head -c 5000000 /dev/zero >&2; exit 7"
    done = guest.run(["sh", "-c", script], timeout=120)
    assert (len(done.stdout), len(done.stderr), done.status) == (5000000, 5000000, 7)
    data = os.urandom(3_000_000)
    assert guest.run(["cat"], input=data, timeout=120).stdout == data
    # A command that does not read its input.
    assert guest.run(["true"], input=data, timeout=60).status == 0
    words = ["printf", "%s|", "a b", "$HOME", "'", '"', "*", "", "\\", "é", "a\nb"]
    assert guest.run(words, timeout=30).stdout.decode() == "".join(f"{word}|" for word in words[2:])


def test_a_command_that_takes_too_long_is_given_up(guest: connection.Connection) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="did not end within 1 s") as caught:
        guest.run(["sleep", "60"], timeout=1.0)
    assert caught.value.status == 1
    assert time.monotonic() - began < 10
    assert guest.run(["sh", "-c", "kill -9 $$"], timeout=30).status == connection.UNKNOWN_STATUS


def test_streams_and_sockets_into_the_guest(guest: connection.Connection) -> None:
    with guest.open(["sh", "-c", "echo ready >&2; exec cat"]) as stream:
        stream.settimeout(60.0)
        stream.write(b"one\ntwo\n")
        assert stream.readline() == b"one\n"
        stream.close_write()
        assert stream.read() == b"two\n"
        assert stream.status(30.0) == 0
        assert stream.stderr() == b"ready\n"
    server = ["systemd-run", "--quiet", "socat", "UNIX-LISTEN:/run/echo.sock,fork", "EXEC:cat"]
    assert guest.run(server, timeout=30).status == 0
    assert guest.run(["sh", "-c", "until test -S /run/echo.sock; do sleep .1; done"], timeout=30).status == 0
    with guest.unix_socket("/run/echo.sock") as stream:
        stream.settimeout(60.0)
        stream.write(b"hello\n")
        assert stream.readline() == b"hello\n"


def test_run_passes_everything_through(booted: Booted) -> None:
    done = booted.hostos("run", "-m", "main", "--", "sh", "-c", "cat; echo err >&2; exit 3", input="piped\n" * 50000)
    assert (done.status, done.out, done.err) == (3, "piped\n" * 50000, "err\n")
    done = booted.hostos("ssh", "-m", "main", "--", "exit 5")
    assert done.status == 5


def test_run_with_a_terminal(booted: Booted) -> None:
    """Raw mode, window size and its changes, Ctrl-C for the guest, exit status."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    before = termios.tcgetattr(child)
    script = "stty size; trap 'echo caught; stty size; exit 9' INT; echo go; while :; do sleep .2; done"
    process = subprocess.Popen(
        booted.hostos.words("run", "-m", "main", "--", "sh", "-c", script),
        stdin=child,
        stdout=child,
        stderr=child,
        env=booted.hostos.env(),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    shown = b""

    def read_until(text: bytes) -> None:
        nonlocal shown
        give_up = time.monotonic() + 60
        while text not in shown:
            assert time.monotonic() < give_up, shown
            if select.select([parent], [], [], 1.0)[0]:
                shown += os.read(parent, 4096)

    try:
        read_until(b"go")
        assert b"33 77" in shown
        # The kernel tells the foreground process of a size that changes.
        fcntl.ioctl(parent, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        time.sleep(1.0)
        os.write(parent, b"\x03")
        read_until(b"40 100")
        assert b"caught" in shown
        assert process.wait(30) == 9
        assert termios.tcgetattr(child) == before
    finally:
        process.kill()
        process.wait()
        os.close(parent)
        os.close(child)


def test_ctrl_c_without_a_terminal_reaches_the_command(booted: Booted) -> None:
    script = "trap 'echo caught; exit 4' INT; echo go; while :; do sleep .1; done"
    process = booted.hostos.start("run", "-m", "main", "--", "sh", "-c", script)
    assert process.stdout.readline() == b"go\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == (b"caught\n", 4)


def serve(booted: Booted, port: int, word: str) -> None:
    booted.ssh("systemd-run", "--quiet", "socat", f"TCP-LISTEN:{port},fork,reuseaddr", f"SYSTEM:echo {word}")
    booted.ssh(f"until netstat -ltn | grep -q :{port}; do sleep .1; done")


def test_published_and_swarm_ports_lead_into_the_guest(booted: Booted) -> None:
    # The BitTorrent client listens there itself.
    booted.ssh("systemctl stop hostos-live.socket hostos-live.service || true")
    for port, guest_port, word in [(booted.published, 8000, "web"), (booted.facts["swarm_port"], 6881, "swarm")]:
        serve(booted, guest_port, word)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client, client.makefile() as stream:
            assert stream.readline() == f"{word}\n"


def test_ports_are_published_and_withdrawn_while_it_runs(booted: Booted) -> None:
    """TCP and UDP, all or none; shown by status; a taken port is refused."""
    hostos = booted.hostos
    with socket.create_server(("127.0.0.1", 0)) as probe:
        tcp, udp = probe.getsockname()[1], probe.getsockname()[1]
        held = hostos("port", "add", "-m", "main", f"{udp}:53/udp", f"{tcp}:8001")
        assert held.status == 2
        assert f"port 127.0.0.1:{tcp}/tcp is taken" in held.err
    hostos("port", "add", "-m", "main", f"{udp}:5300/udp", f"{tcp}:8001").ok()
    published = [f"127.0.0.1:{booted.published}:8000/tcp", f"127.0.0.1:{udp}:5300/udp", f"127.0.0.1:{tcp}:8001/tcp"]
    assert hostos("port", "ls", "-m", "main").ok().out.splitlines() == published
    assert hostos("status", "-m", "main", "--json").json()["publish"] == published
    serve(booted, 8001, "added")
    with socket.create_connection(("127.0.0.1", tcp), timeout=30) as client, client.makefile() as stream:
        assert stream.readline() == "added\n"
    booted.ssh("systemd-run", "--quiet", "socat", "UDP-LISTEN:5300,fork", "EXEC:cat")
    booted.ssh("until netstat -lun | grep -q :5300; do sleep .1; done")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(30)
        client.sendto(b"datagram", ("127.0.0.1", udp))
        assert client.recv(100) == b"datagram"
    assert hostos("port", "add", "-m", "main", f"{tcp}:8002").status == 2
    hostos("port", "rm", "-m", "main", str(tcp), f"{udp}/udp").ok()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", tcp), timeout=30)
    assert hostos("port", "ls", "-m", "main").ok().out.splitlines() == published[:1]
    assert hostos("port", "rm", "-m", "main", str(tcp)).status == 2


def test_the_guest_reaches_the_hosts_loopback(booted: Booted) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        reading = booted.hostos.start("ssh", "-m", "main", "--", f"socat -u TCP:10.0.2.2:{server.getsockname()[1]} -")
        peer = server.accept()[0]
        with peer:
            peer.sendall(b"from the host\n")
        assert reading.communicate(timeout=30)[0] == b"from the host\n"


def test_up_twice_changes_nothing(booted: Booted) -> None:
    directory = booted.hostos.directory("main")
    before = {
        path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name != "serial.log"
    }
    again = booted.hostos.up("-m", "main", "--memory", "2048")
    assert again.status == 2
    assert "is running already" in again.err
    assert "hostos down -m main" in again.err
    after = {
        path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name != "serial.log"
    }
    assert after == before


def test_a_hostname_in_use_is_refused(booted: Booted) -> None:
    refused = booted.hostos.up("-m", "second", "--hostname", "GUEST1")
    assert refused.status == 2
    assert "machine 'main' runs with it" in refused.err
    assert not booted.hostos.directory("second").exists()


def test_status_ls_and_ip(booted: Booted) -> None:
    began = time.monotonic()
    facts = booted.hostos("status", "-m", "main", "--json").json()
    assert time.monotonic() - began < 3
    assert facts["state"] == "running"
    assert facts["pid"] in booted.hostos.qemus()
    assert booted.hostos("status", "-m", "main").ok().out.startswith("running\n")
    listed = [each for each in booted.hostos("ls", "--json").json() if each["machine"] == "main"]
    assert len(listed) == 1
    assert "guest1" in booted.hostos("ls").ok().out
    address = booted.hostos("ip", "-m", "main").ok()
    assert address.out == "127.0.0.1\n"
    assert str(facts["ssh"]["port"]) in address.err
    assert booted.hostos("logs", "-m", "main", "--qemu").status == 0


def test_a_stopped_qemu_is_unresponsive_and_comes_back(booted: Booted) -> None:
    os.kill(booted.facts["pid"], signal.SIGSTOP)
    try:
        facts = booted.hostos("status", "-m", "main", "--json").json()
        assert facts["state"] == "unresponsive"
    finally:
        os.kill(booted.facts["pid"], signal.SIGCONT)
    assert booted.hostos("status", "-m", "main", "--json").json()["state"] == "running"


def test_down_is_clean_and_leaves_nothing(booted: Booted) -> None:
    """Last but one: it ends the machine of this module."""
    down = booted.hostos("down", "-m", "main", "--json")
    stopped = down.json()
    assert (stopped["how"], stopped["clean"]) == ("power off over SSH", True), down.err
    assert booted.hostos.qemus() == []
    directory = booted.hostos.directory("main")
    assert not (directory / "qemu.pid").exists()
    assert not (directory / "initrd").exists()
    assert list((booted.hostos.home / "run" / "m").iterdir()) == []
    assert "reboot: Power down" in (directory / "serial.log").read_text(errors="replace")
    for port in (booted.facts["ssh"]["port"], booted.published):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=2):
            pytest.fail(f"port {port} is still open")
    again = booted.hostos("down", "-m", "main")
    assert again.status == 2
    assert "is not running" in again.err
    for command in (["ip"], ["ssh", "--", "true"], ["logs", "--journal"]):
        refused = booted.hostos(command[0], "-m", "main", *command[1:])
        assert refused.status == 2, command
        assert "hostos up -m main" in refused.err


def test_run_brings_it_up_again_as_it_was(booted: Booted) -> None:
    done = booted.hostos("run", "-m", "main", "--", "cat", "/etc/hostname", "/proc/cmdline")
    assert done.status == 0, done.err
    assert done.out.startswith("guest1\n")
    assert "hostos.ssh_key=" in done.out
    assert "machine 'main' is not running: starting it" in done.err
    facts = booted.hostos("status", "-m", "main", "--json").json()
    # The same ports, hence the same ssh_config for whoever uses it.
    assert facts["ssh"]["port"] == booted.facts["ssh"]["port"]
    assert facts["publish"] == booted.facts["publish"]
    booted.hostos("kill", "-m", "main").ok()
    assert booted.hostos.qemus() == []


def test_little_memory_an_rsa_key_and_a_path_with_spaces(
    session_hostos: Any, keys: Callable[..., Path], tmp_path: Path
) -> None:
    hostos = type(session_hostos)(session_hostos.home.parent / "a home, with spaces", session_hostos.os_dir)
    refused = hostos.up("--memory", "100")
    assert refused.status == 2
    assert "needs at least" in refused.err
    assert not hostos.home.exists()
    key = keys("rsa", ("-t", "rsa", "-b", "4096"), comment="rsa")
    second = keys("rsa2", ("-t", "rsa", "-b", "4096"), comment="by the archive alone")
    try:
        hostos.up("--memory", "192", "--key", key, "--key", second).ok()
        authorized = hostos("ssh", "--", "cat", "/root/.ssh/authorized_keys").ok().out
        assert key.read_text() in authorized
        assert second.read_text() in authorized
        assert len(hostos("ssh", "--", "cat", "/proc/cmdline").ok().out) <= 2048
        total = int(hostos("ssh", "--", "awk '/^MemTotal/ {print $2}' /proc/meminfo").ok().out)
        assert total < 192 * 1024
        assert hostos("ssh", "--", "systemctl", "--failed", "--no-legend").ok().out == ""
        assert hostos("down", "--json").json()["clean"] is True
    finally:
        hostos.clean_up()


@pytest.mark.skipif(bool(accel.kvm_device_fault()), reason="needs a /dev/kvm that answers")
def test_kvm_is_proven_or_given_up(hostos: Any) -> None:
    """On some hosts the device answers and no guest ever runs; a guest of another architecture is never tried."""
    asked = hostos.up("--accel", "kvm", "--json")
    if hostos.arch != os_image.host_arch():
        assert asked.status == 2
        assert f"kvm cannot run an {hostos.arch} guest on an {os_image.host_arch()} host" in asked.err
        assert hostos.qemus() == []
        return
    if asked.status == 0:
        assert asked.json()["accelerator"] == "kvm"
        return
    assert asked.status == 1
    assert "KVM does not run guests here" in asked.err
    assert hostos.qemus() == []
    # With flags that promise KVM, auto finds out by itself, says so, goes on and remembers.
    cpuinfo = hostos.home / "cpuinfo"
    cpuinfo.write_text("flags : vmx svm\n")
    program = f"""
from pathlib import Path
from hostos.cli import main
from hostos.machine import accel
accel.CPUINFO = Path({str(cpuinfo)!r})
main()
"""
    hostos.words = lambda *words: [sys.executable, "-c", program, *map(str, words)]
    up = hostos.up("--json", "--accel", "auto")
    assert up.json()["accelerator"] == "tcg"
    assert "running under TCG" in up.err
    assert "never runs" in up.err
    hostos("kill").ok()
    again = hostos("up", "--dry-run", "--json").json()["command"]
    assert again[again.index("-accel") + 1].startswith("tcg")
    assert "never runs" in json.loads((hostos.home / "cache" / "accelerator.json").read_text())["kvm_fault"]
