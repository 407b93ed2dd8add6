"""Machines broken on purpose: each fault has one defined outcome, and `up` works afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.boot, pytest.mark.fault]

STAGES = ["", "QEMU started", "monitor answers", "guest speaks", "SSH answers", "key accepted"]
stages = pytest.mark.parametrize("stage", STAGES, ids=[stage or "at once" for stage in STAGES])


def start_until(hostos: Any, stage: str, *words: str) -> subprocess.Popen[bytes]:
    """`hostos up` in the background, at the moment it reports that `stage` is done."""
    up = hostos.start("up", "--os", hostos.os_dir, *words)
    give_up = time.monotonic() + 120
    while stage:
        line = up.stderr.readline().decode()
        assert line, "it ended before"
        assert time.monotonic() < give_up
        if stage in line:
            break
    else:
        time.sleep(0.2)
    return up


def nothing_left(hostos: Any, machine: str = "default") -> None:
    """No process, socket, pid file, half-written file or copied initrd."""
    assert hostos.qemus() == []
    directory = hostos.directory(machine)
    assert not (hostos.home / "run" / "m" / machine).exists()
    if directory.exists():
        names = {path.name for path in directory.iterdir()}
        assert names <= {"config.json", "run.json", "lock", "identity", "qemu.log", "serial.log", "ssh_config"}


def works(hostos: Any) -> None:
    up = hostos.up("--json").json()
    assert up["state"] == "running"
    assert hostos("ssh", "--", "echo", "fine").ok().out == "fine\n"


@stages
def test_the_launcher_is_killed(hostos: Any, stage: str) -> None:
    """SIGKILL: QEMU goes on alone. The next `up` notices, ends it and starts anew."""
    up = start_until(hostos, stage)
    up.kill()
    up.communicate()
    left = hostos.qemus()
    assert len(left) == (1 if stage else len(left))
    if stage and hostos.directory().exists():
        state = hostos("status", "--json").json()["state"]
        assert state == "interrupted"
        refused = hostos("ssh", "--", "true")
        assert refused.status == 2
        assert "interrupted" in refused.err
    works(hostos)
    assert not set(left) & set(hostos.qemus())


@stages
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_launcher_is_interrupted(hostos: Any, stage: str, number: signal.Signals) -> None:
    """Ctrl-C or SIGTERM: exit 130, nothing left. (Before Python runs our code it may be 128 + n.)"""
    up = start_until(hostos, stage)
    up.send_signal(number)
    _, err = up.communicate(timeout=30)
    assert up.returncode == 130 or (not stage and (up.returncode == -number or b"init_import_site" in err)), err
    assert b"Traceback" not in err or not stage
    nothing_left(hostos)
    if hostos.directory().exists():
        assert hostos("status", "--json").json()["state"] == "stopped"


def test_an_interrupt_at_any_moment_leaves_nothing(hostos: Any) -> None:
    """At 24 moments until QEMU runs and a little later: new machines and one that has been up before."""
    began = time.monotonic()
    up = start_until(hostos, "QEMU started")
    until_qemu = time.monotonic() - began
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=60)
    for moment in range(24):
        machine = f"m{moment}" if moment % 3 else "default"
        number = signal.SIGINT if moment % 2 else signal.SIGTERM
        up = hostos.start("up", "-m", machine, "--os", hostos.os_dir)
        time.sleep(1.3 * until_qemu * moment / 24)
        up.send_signal(number)
        _, err = up.communicate(timeout=60)
        # Before a machine is worked on nothing need be undone, and the signal itself ends the command, or Python
        # gives up that has not come to our code.
        assert up.returncode in (130, -number) or b"init_import_site" in err, (moment, err.decode())
        assert up.returncode == 130 or b"QEMU started" not in err, (moment, err.decode())
        nothing_left(hostos, machine)
    works(hostos)


def test_up_works_after_an_interrupted_one(hostos: Any) -> None:
    up = start_until(hostos, "guest speaks")
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=30)
    works(hostos)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_qemu_is_killed_during_the_start(hostos: Any, stage: str) -> None:
    up = start_until(hostos, stage)
    (pid,) = hostos.qemus()
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    _, err = up.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert up.returncode == 1
    assert b"killed by signal 9" in err
    assert b"hostos logs -m default --serial" in err
    nothing_left(hostos)


def test_qemu_is_killed_later(hostos: Any) -> None:
    works(hostos)
    (pid,) = hostos.qemus()
    running = hostos.start("run", "--", "sleep", "600")
    time.sleep(3)
    os.kill(pid, signal.SIGKILL)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 1
    assert b"the connection ended while sleep ran" in err
    assert hostos("status", "--json").json()["state"] == "stopped"
    assert hostos("down").status == 2
    works(hostos)


def test_two_launchers_at_once(hostos: Any) -> None:
    both = [hostos.start("up", "--os", hostos.os_dir) for _ in range(2)]
    ended = [up.communicate(timeout=240)[1].decode() for up in both]
    assert sorted(up.returncode for up in both) == [0, 2], ended
    loser = ended[0 if both[0].returncode else 1]
    assert "is starting" in loser or "is busy: hostos up" in loser
    assert len(hostos.qemus()) == 1
    hostos("kill").ok()


def test_several_commands_that_need_it_start_it_once(hostos: Any) -> None:
    works(hostos)
    hostos("down").ok()
    several = [hostos.start("run", "--", "echo", str(number)) for number in range(3)]
    for number, each in enumerate(several):
        out, err = each.communicate(timeout=240)
        assert (each.returncode, out) == (0, b"%d\n" % number), err
    assert len(hostos.qemus()) == 1


def test_four_machines_at_once(hostos: Any) -> None:
    names = [f"m{number}" for number in range(4)]
    several = [hostos.start("up", "-m", name, "--memory", "256", "--os", hostos.os_dir) for name in names]
    for each in several:
        _, err = each.communicate(timeout=400)
        assert each.returncode == 0, err
    assert {machine["state"] for machine in hostos("ls", "--json").json()} == {"running"}
    keys = {
        hostos("ssh", "-m", name, "--", "cat", "/etc/hostos/instance/ssh_host_ed25519_key.pub").out for name in names
    }
    assert len(keys) == 4
    assert {hostos("ssh", "-m", name, "--", "hostname").out for name in names} == {f"{name}\n" for name in names}


def test_a_hanging_qemu_can_still_be_ended(hostos: Any) -> None:
    works(hostos)
    (pid,) = hostos.qemus()
    os.kill(pid, signal.SIGSTOP)
    assert hostos("status", "--json").json()["state"] == "unresponsive"
    refused = hostos.up()
    assert refused.status == 2
    assert "does not answer" in refused.err
    stopped = hostos("down", "--json", "--timeout", "2").json()
    assert stopped["clean"] is False
    nothing_left(hostos)


def copy_os(source: Path, target: Path, **changes: Any) -> Path:
    """An OS directory of links into `source`, with a manifest of its own."""
    target.mkdir()
    manifest = json.loads((source / "manifest.json").read_text())
    for name in manifest["files"]:
        os.link(source / name, target / name) if source.stat().st_dev == target.stat().st_dev else shutil.copy(
            source / name, target / name
        )
    (target / "manifest.json").write_text(json.dumps(manifest | changes))
    return target


def truncate(directory: Path, name: str, size: int) -> None:
    """Cut a file short, and say so in the manifest, as a broken build would."""
    data = (directory / name).read_bytes()[:size]
    (directory / name).unlink()
    (directory / name).write_bytes(data)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name]["size"] = size
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("share", [0.5, 0.98])
def test_a_truncated_initrd(hostos: Any, share: float) -> None:
    cut = copy_os(hostos.os_dir, hostos.home.parent / "os")
    for name in ("initrd.cpio", "initrd.gz"):
        if (cut / name).exists():
            truncate(cut, name, int((cut / name).stat().st_size * share))
    failed = hostos("up", "--os", cut)
    assert failed.status == 1
    assert "the guest failed" in failed.err or "powered itself off" in failed.err
    assert "    | " in failed.err
    nothing_left(hostos)


def test_memory_too_small_to_unpack(hostos: Any) -> None:
    """What the floor protects from: the kernel goes on with half a file system."""
    # Not so low that the archive that is not compressed would be taken: for that there is not even memory to start.
    lying = copy_os(hostos.os_dir, hostos.home.parent / "os", min_memory_mib=64)
    failed = hostos("up", "--os", lying, "--memory", "100")
    assert failed.status == 1
    assert "the guest failed" in failed.err or "powered itself off" in failed.err
    nothing_left(hostos)


def test_a_kernel_that_panics(hostos: Any) -> None:
    manifest = json.loads((hostos.os_dir / "manifest.json").read_text())
    broken = copy_os(
        hostos.os_dir, hostos.home.parent / "os", cmdline=manifest["cmdline"] + " rdinit=/nowhere root=/dev/none"
    )
    failed = hostos("up", "--os", broken)
    assert failed.status == 1
    assert "Kernel panic" in failed.err
    nothing_left(hostos)


def test_not_ready_in_time(hostos: Any) -> None:
    began = time.monotonic()
    failed = hostos.up("--timeout", "1.5")
    assert failed.status == 1
    assert "not ready within 1.5 s" in failed.err
    assert time.monotonic() - began < 15
    nothing_left(hostos)


def qemu_wrapper(hostos: Any, script: str) -> None:
    """Puts a program in QEMU's place that changes its command line."""
    name = f"qemu-system-{hostos.arch}"
    real = shutil.which(name)
    place = hostos.home.parent / "bin"
    place.mkdir()
    wrapper = place / name
    wrapper.write_text(f"#!{sys.executable}\nimport os, sys\nreal = {real!r}\nline = sys.argv[1:]\n{script}\n")
    wrapper.chmod(0o755)
    hostos.environment["PATH"] = f"{place}:{os.environ['PATH']}"


def in_process(hostos: Any, prelude: str) -> None:
    """Runs `hostos` with some of its insides changed."""
    program = f"from hostos.cli import main\n{prelude}\nmain()\n"
    hostos.words = lambda *words: [sys.executable, "-c", program, *map(str, words)]


def test_qemu_refuses_its_options(hostos: Any) -> None:
    qemu_wrapper(hostos, "os.execv(real, [real, '-no-such-option', *line])")
    failed = hostos.up("--accel", "tcg")
    assert failed.status == 1
    assert "QEMU ended with status 1" in failed.err
    assert "no-such-option" in failed.err
    nothing_left(hostos)


def test_qemu_gets_no_memory(hostos: Any) -> None:
    """The host refuses it the guest's memory: QEMU ends at once and says so."""
    qemu_wrapper(
        hostos,
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\nos.execv(real, [real, *line])",
    )
    failed = hostos.up("--accel", "tcg", "--memory", "3000")
    assert failed.status == 1
    assert "QEMU ended with status 1" in failed.err
    assert "memory" in failed.err.partition("ended with status 1")[2]
    nothing_left(hostos)


def test_the_monitor_socket_is_gone(hostos: Any) -> None:
    """Somebody tidied the runtime directory: QEMU can't be asked, the guest can still be powered off."""
    works(hostos)
    (hostos.home / "run" / "m" / "default" / "monitor.sock").unlink()
    facts = hostos("status", "--json").json()
    assert (facts["state"], "does not answer" in facts["reason"]) == ("unresponsive", True)
    refused = hostos.up()
    assert refused.status == 2
    assert "hostos kill" in refused.err
    for command in (["port", "add", "28080:80"], ["suspend"]):
        failed = hostos(*command)
        assert failed.status in (1, 2), command
        assert "Traceback" not in failed.err
    assert hostos("down", "--json").json()["clean"] is True
    nothing_left(hostos)


def test_a_guest_that_never_prints(hostos: Any) -> None:
    """Under emulation nothing need be printed; the time for the whole start ends it."""
    qemu_wrapper(
        hostos,
        "for option in ('-kernel', '-initrd', '-append'):\n"
        "    place = line.index(option)\n"
        "    del line[place:place + 2]\n"
        "os.execv(real, [real, *line])",
    )
    failed = hostos.up("--accel", "tcg", "--timeout", "6")
    assert failed.status == 1
    assert "not ready within 6 s" in failed.err
    assert "the guest printed nothing" in failed.err
    nothing_left(hostos)


def test_a_guest_without_sshd(hostos: Any) -> None:
    hostos.environment["HOSTOS_TIMEOUT_SCALE"] = "0.1"
    # A target that wants nothing, sshd least of all.
    failed = hostos.up("--append", "systemd.unit=paths.target")
    assert failed.status == 1
    assert "no SSH server answers on 127.0.0.1:" in failed.err
    assert "HOSTOS_TIMEOUT_SCALE" in failed.err
    nothing_left(hostos)


def test_sshd_dies_later(hostos: Any) -> None:
    """The guest starts it again; sessions live on."""
    works(hostos)
    session = hostos.start("run", "--", "sh", "-c", "echo here; sleep 8; echo still here")
    assert session.stdout.readline() == b"here\n"
    hostos("ssh", "--", "kill -9 $(systemctl show -P MainPID ssh.service)").ok()
    give_up = time.monotonic() + 60
    while hostos("ssh", "--", "echo fine").out != "fine\n":
        assert time.monotonic() < give_up
    out, err = session.communicate(timeout=60)
    assert (session.returncode, out) == (0, b"still here\n"), err
    assert hostos("down", "--json").json()["clean"] is True


def test_an_accelerator_under_which_no_guest_ever_prints(hostos: Any) -> None:
    """The device is fine, the flags are, and nothing happens: a machine without anything to boot."""
    qemu_wrapper(
        hostos,
        """
if line[line.index("-accel") + 1] == "kvm":
    line[line.index("-accel") + 1] = "tcg"
    line[line.index("-cpu") + 1] = "max"
    for option in ("-kernel", "-initrd", "-append"):
        place = line.index(option)
        del line[place:place + 2]
os.execv(real, [real, *line])
""",
    )
    # What is tested is what comes after the checks of the device.
    believe = """
from hostos.machine import accel
accel.kvm_device_fault = accel.kvm_cpu_fault = lambda: ""
accel.FIRST_OUTPUT_SECONDS = 3.0
"""
    in_process(hostos, believe)
    asked = hostos.up("--accel", "kvm")
    assert asked.status == 1
    assert "printed nothing within 3 s" in asked.err
    nothing_left(hostos)
    up = hostos.up("--accel", "auto", "--json")
    assert up.json()["accelerator"] == "tcg"
    assert "running under TCG" in up.err
    assert "printed nothing within 3 s" in up.err
    hostos("down").ok()
    # Remembered: the next start does not try again.
    again = hostos.up("--json")
    assert again.json()["accelerator"] == "tcg"
    assert "remembered" in again.err
    hostos("kill").ok()


def test_a_port_taken_between_choice_and_use(hostos: Any) -> None:
    """Somebody takes the SSH port right before QEMU does, twice."""
    take = """
import socket
from hostos.machine import start
holders = []
def spawn(command, log, real=start.spawn):
    if len(holders) < 2:
        forwards = command[command.index("-netdev") + 1]
        port = int(forwards.split("hostfwd=tcp:127.0.0.1:")[1].split("-")[0])
        holders.append(socket.create_server(("127.0.0.1", port)))
    return real(command, log)
start.spawn = spawn
"""
    in_process(hostos, take)
    up = hostos.up("--json")
    assert up.json()["state"] == "running"
    assert up.err.count("was taken meanwhile: choosing another") == 2
    hostos("kill").ok()


def test_damaged_files_do_not_block_the_next_start(hostos: Any) -> None:
    works(hostos)
    hostos("down").ok()
    directory = hostos.directory()
    (directory / "config.json").write_text('{"schema": 1, "cpus": "many"}')
    (directory / "run.json").write_text("{")
    (directory / "identity" / "ssh_host_ed25519").write_text("")
    (directory / "identity" / "known_hosts").write_text("")
    (directory / "qemu.pid").write_text("1\n")
    (directory / "initrd").write_text("left over")
    assert hostos("status", "--json").json()["state"] == "broken"
    up = hostos.up("--json")
    assert up.json()["state"] == "running"
    assert "starting from the defaults" in up.err
    assert hostos("ssh", "--", "true").status == 0


def test_a_guest_that_does_not_power_off(hostos: Any) -> None:
    works(hostos)
    # sshd is gone and the button does nothing: the monitor ends it.
    hostos(
        "ssh",
        "--",
        "systemctl stop hostos-power-button.service; systemd-run --quiet --no-block systemctl stop ssh.service",
    )
    time.sleep(2)
    stopped = hostos("down", "--json", "--timeout", "3").json()
    assert (stopped["how"], stopped["clean"]) == ("monitor quit", False)
    nothing_left(hostos)


def test_the_stop_ladder_presses_the_button_without_ssh(hostos: Any) -> None:
    works(hostos)
    hostos("ssh", "--", "systemd-run --quiet --no-block systemctl stop ssh.service")
    time.sleep(2)
    stopped = hostos("down", "--json").json()
    assert (stopped["how"], stopped["clean"]) == ("power button", True)
    nothing_left(hostos)


@pytest.mark.soak
def test_twenty_cycles_leave_nothing(hostos: Any) -> None:
    def outside() -> set[str]:
        return {path.name for path in Path(tempfile.gettempdir()).iterdir() if "hostos" in path.name}

    before = outside()
    for _ in range(20):
        facts = hostos.up("--memory", "192", "--json").json()
        assert hostos("down", "--json").json()["clean"] is True
        nothing_left(hostos)
        for port in (facts["ssh"]["port"], facts["swarm_port"]):
            with socket.create_server(("127.0.0.1", port)):
                pass
    assert outside() == before
