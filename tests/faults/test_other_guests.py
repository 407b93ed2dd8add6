"""Kernels and initrds of other makers, by path: ours, one without SSH, one with an SSH server of its own."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from programs import static_busybox

from hostos import cpio

pytestmark = [pytest.mark.boot, pytest.mark.fault]

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /dev
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox cat /proc/cmdline
{}
echo "the stranger is up"
while :; do /bin/busybox sleep 1000; done
"""
# Greets as an SSH server does and knows no more.
GREETER = """/bin/busybox ifconfig eth0 10.0.2.15 up
/bin/busybox sh -c 'while :; do /bin/busybox nc -l -p 22 -e /bin/busybox echo SSH-2.0-Stranger; done' &"""


def stranger(path: Path, commands: str) -> Path:
    """An initrd with BusyBox as all there is."""
    out = io.BytesIO()
    cpio.write_newc(
        [
            cpio.directory("bin"),
            cpio.file("bin/busybox", static_busybox(), 0o755),
            cpio.file("init", INIT.format(commands).encode(), 0o755),
        ],
        out,
    )
    path.write_bytes(gzip.compress(out.getvalue(), 1))
    return path


def test_our_own_by_path(hostos: Any) -> None:
    kernel, initrd = hostos.kernel, hostos.os_dir / "initrd.gz"
    up = hostos("up", "--kernel", kernel, "--initrd", initrd, "--append", "some.word=1", "--json").json()
    assert (up["reached"], up["failed_units"]) == ("system", [])
    line = hostos("ssh", "--", "cat", "/proc/cmdline").ok().out
    assert " some.word=1 " in line
    assert " host=default " in line
    assert ' sshkey="ssh-ed25519 ' in line
    hostos("down").ok()
    # Remembered, until another OS is named.
    command = hostos("up", "--dry-run", "--json").json()["command"]
    assert command[command.index("-kernel") + 1] == str(kernel)
    command = hostos.up("--dry-run", "--json").json()["command"]
    assert "some.word" not in command[command.index("-append") + 1]


def test_a_guest_without_ssh(hostos: Any, tmp_path: Path) -> None:
    hostos.environment["HOSTOS_TIMEOUT_SCALE"] = "0.5"
    initrd = stranger(tmp_path / "initrd.gz", "")
    up = hostos("up", "-m", "box", "--kernel", hostos.kernel, "--initrd", initrd, "--memory", "128")
    assert up.status == 0, up.err
    assert "the guest runs, but no SSH server answers in it. Its console: hostos console -m box" in up.err
    assert "RUNNING after" in up.err
    facts = hostos("status", "-m", "box", "--json").json()
    assert (facts["state"], facts["reached"]) == ("running", "console")
    said = hostos("logs", "-m", "box").ok().out
    assert "the stranger is up" in said
    assert 'host=box sshkey="ssh-ed25519 ' in said
    refused = hostos("ssh", "-m", "box", "--", "true")
    assert (refused.status, "hostos console -m box" in refused.err) == (2, True)
    stopped = json.loads(hostos("down", "-m", "box", "--json", "--timeout", "3").ok().out)
    assert stopped["clean"] is False


def test_a_guest_with_an_ssh_server_that_is_not_ours(hostos: Any, tmp_path: Path) -> None:
    hostos.environment["HOSTOS_TIMEOUT_SCALE"] = "0.2"
    initrd = stranger(tmp_path / "initrd.gz", GREETER)
    up = hostos("up", "--kernel", hostos.kernel, "--initrd", initrd, "--memory", "128")
    assert up.status == 0, up.err
    assert "an SSH server answers, but it is not ours to use" in up.err
    assert hostos("status", "--json").json()["reached"] == "ssh"
    hostos("kill").ok()


def test_what_is_no_guest(hostos: Any, tmp_path: Path) -> None:
    kernel, initrd = hostos.kernel, hostos.os_dir / "initrd.gz"
    (tmp_path / "empty").touch()
    for words, says in [
        (["--kernel", initrd], "is no Linux kernel"),
        (["--kernel", tmp_path / "absent"], "No such file"),
        (["--kernel", tmp_path / "empty"], "has 0 bytes"),
        (["--kernel", kernel, "--initrd", kernel], "is a kernel, not an initrd"),
        (["--initrd", initrd], "--initrd without --kernel"),
        (["--kernel", kernel, "--os", hostos.os_dir], "exclude each other"),
        (["--kernel", kernel, "--append", "x" * 2048], "the kernel reads 2047"),
    ]:
        refused = hostos("up", *words)
        assert (refused.status, says in refused.err) == (2, True), refused.err
        assert not hostos.home.exists()
