"""A machine loaded from a template of its OS: as good as one that was booted, and nobody else."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytestmark = pytest.mark.boot

# Everything by which two machines can be told apart, a line each.
WHO = """
cat /etc/machine-id /etc/hostos/instance/ssh_host_ed25519_key.pub /sys/class/net/eth0/address
hostname
until test -e /run/hostos/boot_id; do busybox sleep 0.1; done
cat /proc/sys/kernel/random/boot_id
head -c 32 /dev/urandom | base64
head -c 32 /dev/random | base64
ls /run/log/journal
"""
WAIT_FOR_THE_JOURNAL = 'until test -n "$(ls /run/log/journal)"; do busybox sleep 0.1; done'


def test_two_clones(hostos: Any) -> None:
    first = hostos.up("--accel", "tcg", "--warm", "--json").json()
    assert [stage["name"] for stage in first["stages"]] == [
        "QEMU started",
        "template loaded",
        "identity taken",
        "SSH answers",
        "key accepted",
    ]
    second = hostos.up("--accel", "tcg", "-m", "other", "--json", "--warm").json()
    assert first["template"] == second["template"]
    seen = []
    for name in ("default", "other"):
        # ssh refuses any host key but the one made for this machine.
        hostos("ssh", "-m", name, "--", WAIT_FOR_THE_JOURNAL).ok()
        lines = hostos("ssh", "-m", name, "--", WHO).ok().out.splitlines()
        assert len(lines) == 8
        assert lines[3] == name
        assert lines[7] == lines[0]
        seen.append(lines)
    assert all(one != another for one, another in zip(*seen, strict=True))

    now = float(hostos("ssh", "--", "date", "+%s").out)
    assert abs(now - time.time()) < 30
    assert hostos("ssh", "--", "systemctl is-system-running --wait; systemctl --failed --no-legend").out == "running\n"
    assert hostos("ssh", "--", "cat", "/proc/sys/kernel/tainted").out == "0\n"
    journal = hostos("logs", "--journal").ok().out
    assert "Accepted publickey for root" in journal
    # QEMU's `virt` machine has no generation ID: there hostos has it renew its random numbers (docs/arm64.md).
    assert ("crng reseeded due to virtual machine fork" in journal) == (hostos.arch == "x86_64")
    authorized = hostos("ssh", "--", "cat", "/root/.ssh/authorized_keys").out
    assert authorized.split()[1] == (hostos.directory() / "identity" / "control_ed25519.pub").read_text().split()[1]
    assert hostos("down", "--json").json()["clean"] is True
    assert hostos("kill", "-m", "other").status == 0
    assert hostos.qemus() == []


def test_it_must_be_possible(hostos: Any) -> None:
    refused = hostos.up("--accel", "tcg", "--warm", "--net", "bridge=nowhere")
    assert refused.status == 2
    assert hostos.qemus() == []
