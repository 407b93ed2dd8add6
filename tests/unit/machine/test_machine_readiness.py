"""The rungs that can be tried without a guest: real processes, files and sockets."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.machine import process, readiness
from hostos.machine.instance import Instance
from hostos.machine.readiness import Deadlines
from hostos.machine.watch import PortTaken, Watch, clean


@pytest.fixture
def instance() -> Instance:
    made = Instance.named("box")
    made.make_directory()
    made.make_socket_dir()
    return made


Start = Callable[[str], Watch]


@pytest.fixture
def start(instance: Instance) -> Iterator[Start]:
    """Starts a Python program in QEMU's place and watches it."""
    started: list[process.QemuProcess] = []

    def run(program: str) -> Watch:
        started.append(process.spawn([sys.executable, "-c", program], instance.qemu_log))
        return Watch(instance, started[-1], None)

    yield run
    for each in started:
        each.signal(signal.SIGKILL)
        assert each.wait(5.0)


SLEEP = "import time; time.sleep(60)"


def test_a_healthy_machine_is_let_be(start: Start) -> None:
    watch = start(SLEEP)
    watch.check()
    assert not watch.spoke
    watch.instance.serial_log.write_text("hello")
    assert watch.spoke
    watch.check()


@pytest.mark.parametrize(
    "line",
    [
        "Initramfs unpacking failed: write error",
        "hostos: initrd incomplete",
        "Kernel panic - not syncing: x",
        "Oops: Oops: 0000 [#1] SMP",
    ],
)
def test_what_the_guest_gives_up_with_is_said(start: Start, line: str) -> None:
    watch = start(SLEEP)
    # It may come in pieces.
    with watch.instance.serial_log.open("w") as log:
        log.write(f"[    0.1] boot\r\n[\x1b[1m    0.7] {line[:4]}")
        log.flush()
        watch.check()
        log.write(f"{line[4:]}\r\nmore\n")
        log.flush()
        with pytest.raises(UserError) as caught:
            watch.check()
    assert line in caught.value.message
    assert "| [    0.1] boot" in caught.value.message
    assert "\x1b" not in caught.value.message
    assert "hostos logs -m box --serial" in caught.value.hint
    assert caught.value.status == 1


def ended(watch: Watch) -> Watch:
    assert watch.process.wait(20.0)
    return watch


def test_qemu_ending_early_is_told_with_its_words(start: Start) -> None:
    watch = ended(start("import sys; print('no such option', file=sys.stderr); sys.exit(3)"))
    with pytest.raises(UserError, match="ended with status 3: no such option"):
        watch.check()
    watch = ended(start("import os; os.kill(os.getpid(), 9)"))
    with pytest.raises(UserError, match="killed by signal 9"):
        watch.check()
    watch = ended(start(""))
    with pytest.raises(UserError, match="powered itself off"):
        watch.check()


def test_a_port_taken_meanwhile_is_recognised(start: Start) -> None:
    watch = ended(
        start("import sys; sys.exit(\"qemu: Could not set up host forwarding rule 'tcp:127.0.0.1:4022-:22'\")")
    )
    with pytest.raises(PortTaken) as caught:
        watch.check()
    assert (caught.value.protocol, caught.value.port) == ("tcp", 4022)


def test_time_is_up(start: Start) -> None:
    watch = start(SLEEP)
    watch.total = 0.0
    with pytest.raises(UserError, match="not ready within 0 s"):
        watch.check()


def test_the_first_greeting_wins_over_stalled_connections(start: Start) -> None:
    """As QEMU's network does it: early connections are accepted and never come to life."""
    watch = start(SLEEP)
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(server.accept()[0])
                    if len(accepted) == 2:
                        accepted[-1].close()
                    if len(accepted) == 6:
                        accepted[-1].sendall(b"SSH-2.0-test\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        port = server.getsockname()[1]
        with readiness.greeted(readiness.Target("127.0.0.1", port), watch, time.monotonic() + 20) as sock:
            assert sock.getpeername()[1] == port
            # The greeting is still there for whoever logs in.
            assert sock.recv(100) == b"SSH-2.0-test\r\n"
        assert len(accepted) >= 6
        for each in accepted:
            each.close()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_nobody_answers(start: Start) -> None:
    watch = start(SLEEP)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="no SSH server answers"):
            readiness.greeted(readiness.Target(*unused.getsockname()), watch, time.monotonic() + 0.5)


def test_only_the_total_is_not_scaled() -> None:
    scaled = Deadlines(first_output=8.0, total=30.0).scaled(2.0)
    assert (scaled.monitor, scaled.first_output, scaled.banner, scaled.total) == (40.0, 16.0, 120.0, 30.0)
    assert Deadlines().scaled(3.0).first_output is None


@given(st.text())
def test_lines_of_the_guest_cannot_play_with_the_terminal(line: str) -> None:
    assert not any(ord(char) < 32 and char != "\t" for char in clean(line))
    assert "\x7f" not in clean(line)
    assert "\x9b" not in clean(line)
