"""Many clones of one template: everything that must differ does, and nothing is left of them."""

from __future__ import annotations

import re
import socket
from typing import Any

import pytest

pytestmark = pytest.mark.soak

MEMORY = "192"
# What tells machines apart, a line each. The random bytes are the first that anybody asks for.
WHO = """
head -c 32 /dev/urandom | base64
head -c 32 /dev/random | base64
cat /etc/machine-id /etc/hostos/instance/ssh_host_ed25519_key.pub /sys/class/net/eth0/address
hostname
until test -e /run/hostos/boot_id; do busybox sleep 0.1; done
cat /proc/sys/kernel/random/boot_id
busybox nc 10.0.2.2 1 2> /dev/null; python3 -c 'import random, uuid; print(random.getrandbits(256), uuid.uuid4())'
"""


@pytest.fixture
def cloning(hostos: Any) -> Any:
    hostos("template", "bake", "--os", hostos.os_dir, "--memory", MEMORY).ok()
    hostos.environment["HOSTOS_TEMPLATES"] = "auto"
    return hostos


def who(hostos: Any, name: str) -> list[str]:
    lines = hostos("ssh", "-m", name, "--", WHO).ok().out.splitlines()
    assert len(lines) == 8, lines
    return [str(line) for line in lines]


def distinct(seen: list[list[str]]) -> None:
    for column in zip(*seen, strict=True):
        assert len(set(column)) == len(seen), column


def test_twelve_one_after_the_other(cloning: Any) -> None:
    seen = []
    for number in range(12):
        name = f"c{number}"
        facts = cloning.up("-m", name, "--accel", "tcg", "--memory", MEMORY, "--json").json()
        assert facts["template"], name
        seen.append(who(cloning, name))
        cloning("kill", "-m", name).ok()
    distinct(seen)


def test_the_same_machine_twelve_times(cloning: Any) -> None:
    """Its keys, name and address stay; what is drawn at random is drawn anew."""
    seen = []
    for _ in range(12):
        assert cloning.up("--accel", "tcg", "--memory", MEMORY, "--json").json()["template"]
        seen.append(who(cloning, "default"))
        cloning("kill").ok()
    for column, stays in zip(
        zip(*seen, strict=True), [False, False, False, True, True, True, False, False], strict=True
    ):
        assert len(set(column)) == (1 if stays else 12), column


def test_four_at_a_time(cloning: Any) -> None:
    seen = []
    for turn in range(3):
        names = [f"c{turn}{number}" for number in range(4)]
        several = [
            cloning.start("up", "-m", name, "--os", cloning.os_dir, "--accel", "tcg", "--memory", MEMORY, "--json")
            for name in names
        ]
        for each in several:
            out, err = each.communicate(timeout=400)
            assert each.returncode == 0, err
            assert re.search(rb'"template": "[0-9a-f]{32}"', out), err
        seen += [who(cloning, name) for name in names]
        for name in names:
            cloning("kill", "-m", name).ok()
    distinct(seen)


def test_fifty_cycles_leave_nothing(cloning: Any) -> None:
    files: set[str] = set()
    for number in range(50):
        facts = cloning.up("--accel", "tcg", "--memory", MEMORY, "--json").json()
        assert facts["template"]
        # Every fifth ends as it should, the others at once.
        if number % 5:
            cloning("kill").ok()
        else:
            assert cloning("down", "--json").json()["clean"] is True
        assert cloning.qemus() == []
        assert list((cloning.home / "run").rglob("*.sock")) == []
        for port in (facts["ssh"]["port"], facts["swarm_port"]):
            with socket.create_server(("127.0.0.1", port)):
                pass
        # Of this home: its runtime directory lies in it.
        left = {str(path.relative_to(cloning.home)) for path in cloning.home.rglob("*")}
        if number == 0:
            files = left
        assert left == files
