"""Bad input: one clear message with the next step, exit 2, nothing changed."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from hostos.cli import main

Run = Callable[..., tuple[int, str, str]]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJwTUwWq+WG3lLW6m6oX2fsfs5bW5sZEUl2yVCMw3Gp+ me"


@pytest.fixture
def hostos(capfd: pytest.CaptureFixture[str], make_os: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command; --os of `up` is a directory that looks complete."""
    directory = make_os()

    def run(*words: str) -> tuple[int, str, str]:
        if words[0] == "up" and "--os" not in words:
            words = (*words, "--os", str(directory))
        with pytest.raises(SystemExit) as left:
            main(list(words))
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return run


def refused(result: tuple[int, str, str], says: str, home: Path) -> None:
    status, out, err = result
    assert status == 2, err
    assert says in err
    assert "hint: " in err
    assert "Traceback" not in err
    assert out == ""
    assert not (home / "state").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["up", "--key", "/absent.pub"], "/absent.pub does not exist"),
        (["up", "--hostname", "under_score"], "not a hostname"),
        (["up", "-m", "Up/Down"], "cannot name a machine"),
        (["up", "--memory", "64"], "at least 160 MiB"),
        (["up", "--cpus", "0"], "not a number of CPUs"),
        (["up", "--accel", "warp"], "no accelerator 'warp'"),
        (["up", "--publish", "http"], "not understood"),
        (["up", "--publish", "8080:80", "--publish", "8080:81"], "published twice"),
        (["up", "--timeout", "-1"], "more than 0 s"),
        (["up", "--os", "/absent"], "/absent does not exist"),
        (["up", "--os", "/"], "not a finished OS build"),
        (["down"], "no machine 'default'"),
        (["kill"], "no machine 'default'"),
        (["ssh"], "no machine 'default'"),
        (["status", "-m", "other"], "no machine 'other'"),
        (["ip"], "no machine 'default'"),
        (["port", "ls"], "no machine 'default'"),
        (["disk", "grow", "20G"], "no machine 'default'"),
        (["up", "--disk", "1M"], "is not possible"),
        (["up", "--disk", "/absent"], "/absent does not exist"),
        (["up", "--share", "/absent"], "/absent does not exist"),
        (["up", "--share", "/tmp:/etc"], "would cover /etc"),
        (["up", "--net", "bridge"], "is not understood"),
        (["up", "--lease-file", "/l"], "--lease-file is for"),
        (["port", "add", "8080:80"], "no machine 'default'"),
        (["logs"], "no machine 'default'"),
    ],
)
def test_bad_input(hostos: Run, home: Path, words: list[str], says: str) -> None:
    refused(hostos(*words), says, home)


def test_private_key_given(hostos: Run, home: Path, tmp_path: Path) -> None:
    key = tmp_path / "id"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n-----END OPENSSH PRIVATE KEY-----\n")
    key.with_suffix(".pub").write_text(KEY)
    result = hostos("up", "--key", str(key))
    refused(result, "is a private key", home)
    assert f"--key {key}.pub" in result[2]
    assert "secret" not in result[2]


def test_port_taken(hostos: Run, home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused(hostos("up", "--publish", f"{port}:80"), f"port 127.0.0.1:{port}/tcp is taken", home)


def test_qemu_missing(hostos: Run, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(hostos("up"), "qemu-system-x86_64 is not installed", home)


def test_half_built_os(hostos: Run, home: Path, make_os: Callable[..., Path]) -> None:
    directory = make_os()
    (directory / "initrd.gz").write_bytes(b"cut")
    refused(hostos("up", "--os", str(directory)), "half-built: initrd.gz", home)


def test_bad_timeout_scale(hostos: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTOS_TIMEOUT_SCALE", "fast")
    refused(hostos("up"), "HOSTOS_TIMEOUT_SCALE='fast'", home)


def test_state_cannot_be_written(hostos: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTOS_HOME", "/proc/none")
    status, _, err = hostos("up")
    assert status == 2
    assert "/proc/none" in err
    assert "HOSTOS_HOME" in err


def test_dry_run_prints_the_command_and_makes_its_files(hostos: Run, home: Path, tmp_path: Path) -> None:
    key = tmp_path / "k.pub"
    key.write_text(KEY + "\r\n")
    status, out, err = hostos("up", "--dry-run", "--json", "--key", str(key), "--memory", "256", "--accel", "tcg")
    assert status == 0
    assert "its files are in" in err
    command = json.loads(out)["command"]
    assert command[command.index("-m") + 1] == "256M"
    append = command[command.index("-append") + 1]
    assert append.startswith("console=ttyS0 quiet hostos.hostname=default norandmaps lpj=25000000 hostos.ssh_key=c3No")
    directory = home / "state" / "machines" / "default"
    assert (directory / "initrd").read_bytes().startswith(b"cpio\0\0\0\0")
    # What was asked for is not remembered, and nothing says that a machine was started.
    assert not (directory / "config.json").exists()
    assert not (directory / "run.json").exists()


def test_ls_of_nothing_and_of_what_is_broken(hostos: Run, home: Path) -> None:
    assert json.loads(hostos("ls", "--json")[1]) == []
    broken = home / "state" / "machines" / "box"
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{")
    (home / "state" / "machines" / "Not a machine").mkdir()
    (listed,) = json.loads(hostos("ls", "--json")[1])
    assert (listed["machine"], listed["state"]) == ("box", "broken")
    assert "run.json" in listed["reason"]
    status, out, _ = hostos("ls")
    assert status == 0
    assert "broken" in out


def test_ports_of_a_machine_that_does_not_run_are_for_its_next_start(hostos: Run, home: Path) -> None:
    (home / "state" / "machines" / "box").mkdir(parents=True)
    status, _, err = hostos("port", "add", "-m", "box", "8080:80", "0.0.0.0:5353:53/udp")
    assert (status, "at its next start" in err) == (0, True)
    assert hostos("port", "ls", "-m", "box")[1].splitlines() == ["127.0.0.1:8080:80/tcp", "0.0.0.0:5353:53/udp"]
    for words, says in [
        (["add", "8080:81"], "published already"),
        (["add", "9090"], "not understood"),
        (["rm", "9090"], "publishes nothing on port 9090/tcp"),
        (["rm", "5353"], "publishes nothing on port 5353/tcp"),
        (["rm", "http"], "not a port"),
    ]:
        status, _, err = hostos("port", words[0], "-m", "box", words[1])
        assert (status, says in err) == (2, True), err
    # The next start takes them, and what is withdrawn is not published again.
    command = json.loads(hostos("up", "-m", "box", "--dry-run", "--json")[1])["command"]
    assert ",hostfwd=tcp:127.0.0.1:8080-:80,hostfwd=udp:0.0.0.0:5353-:53" in " ".join(command)
    assert hostos("port", "rm", "-m", "box", "8080:80", "5353/udp")[0] == 0
    command = json.loads(hostos("up", "-m", "box", "--dry-run", "--json")[1])["command"]
    assert "8080" not in " ".join(command)


def test_a_disk_of_a_machine_that_does_not_run_grows_at_its_next_start(hostos: Run, home: Path) -> None:
    directory = home / "state" / "machines" / "box"
    directory.mkdir(parents=True)
    status, _, err = hostos("disk", "grow", "-m", "box", "128M")
    assert (status, "has no disk of its own" in err) == (2, True)
    (directory / "config.json").write_text('{"schema": 1, "disk": "64M"}')
    assert hostos("disk", "grow", "-m", "box", "128M")[0] == 0
    assert json.loads((directory / "config.json").read_text())["disk"] == "128M"
    command = json.loads(hostos("up", "-m", "box", "--dry-run", "--json")[1])["command"]
    assert f"file.filename={directory}/disk.img,file.discard=unmap" in " ".join(command)


def test_a_disk_is_not_taken_from_a_machine_that_is_suspended(hostos: Run, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "disk"
    with file.open("wb") as stream:
        stream.truncate(64 << 20)
    other = home / "state" / "machines" / "other"
    (other / "saved").mkdir(parents=True)
    started: dict[str, object] = dict.fromkeys(
        ["hostname", "accelerator", "accelerator_reason", "os_directory", "kernel_version"], ""
    )
    started |= dict.fromkeys(["pid", "process_start", "started_at", "ssh_port", "swarm_port", "cpus", "memory_mib"], 0)
    (other / "run.json").write_text(json.dumps({"schema": 1, "command": [], "disk": str(file), **started}))
    status, _, err = hostos("up", "--dry-run", "--disk", str(file))
    assert (status, f"{file} is in use by machine 'other'" in err) == (2, True), err
    (other / "saved").rmdir()
    assert hostos("up", "--dry-run", "--disk", str(file))[0] == 0
