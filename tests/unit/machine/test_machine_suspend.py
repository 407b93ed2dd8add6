from __future__ import annotations

from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.machine import lifecycle
from hostos.machine.instance import Instance
from hostos.machine.lock import locked
from hostos.machine.network import Forward
from hostos.machine.suspend import resuming

CLONE = [
    "/usr/bin/qemu-system-x86_64",
    "-object",
    "memory-backend-file,id=ram,size=512M,mem-path=/cache/a,,b/ram,share=off",
    "-machine",
    "q35,memory-backend=ram",
    "-incoming",
    "defer",
    "-no-reboot",
    "-netdev",
    "user,id=net0,hostfwd=tcp:127.0.0.1:20001-:22",
    "-chardev",
    "socket,id=agent,path=/r/agent.sock,server=on,wait=on",
]
BOOTED = ["qemu", "-machine", "q35", "-kernel", "/os/vmlinux", "-initrd", "/m/initrd", "-append", "-x", "-cpu", "max"]


def test_a_clone_comes_back_without_its_template() -> None:
    assert resuming(CLONE, [Forward(20009, 22)]) == [
        "/usr/bin/qemu-system-x86_64",
        "-object",
        "memory-backend-ram,id=ram,size=512M",
        "-machine",
        "q35,memory-backend=ram",
        "-netdev",
        "user,id=net0,hostfwd=tcp:127.0.0.1:20009-:22",
        "-chardev",
        "socket,id=agent,path=/r/agent.sock,server=on,wait=off",
        "-incoming",
        "defer",
        "-no-reboot",
    ]
    # Suspended again: the same.
    assert resuming(resuming(CLONE, [Forward(20009, 22)]), [Forward(20009, 22)]) == resuming(
        CLONE, [Forward(20009, 22)]
    )


def test_a_machine_that_was_booted_comes_back_without_kernel() -> None:
    assert resuming(BOOTED, []) == ["qemu", "-machine", "q35", "-cpu", "max", "-incoming", "defer", "-no-reboot"]


def make(home: Path, name: str) -> Instance:
    instance = Instance.named(name)
    instance.directory.mkdir(parents=True)
    assert home in instance.directory.parents
    return instance


def test_states(home: Path) -> None:
    instance = make(home, "box")
    assert instance.state() == ("stopped", "")
    instance.saved_part.mkdir()
    assert instance.state()[0] == "stopped"
    instance.saved.mkdir()
    assert instance.state() == ("suspended", "")
    with locked(instance.lock_file, "box", "resume"):
        assert instance.state()[0] == "starting"


def test_removed(home: Path) -> None:
    instance = make(home, "box")
    instance.saved.mkdir()
    with pytest.raises(UserError, match="suspended") as refused:
        lifecycle.remove("box")
    assert refused.value.status == 2
    with locked(instance.lock_file, "box", "up"), pytest.raises(UserError, match="is busy: hostos up"):
        lifecycle.remove("box", force=True)
    lifecycle.remove("box", force=True)
    assert list(instance.directory.parent.iterdir()) == []
    with pytest.raises(UserError, match="there is no machine"):
        lifecycle.remove("box")


def test_whoever_waited_for_a_machine_that_was_removed_is_told(home: Path) -> None:
    """Not: gets a lock that nobody else will ever look at."""
    import threading
    import time

    instance = make(home, "box")
    told: list[str] = []

    def wait() -> None:
        try:
            with locked(instance.lock_file, "box", "down", wait=20.0):
                told.append("locked")
        except UserError as error:
            told.append(error.message)

    waiting = threading.Thread(target=wait)
    with locked(instance.lock_file, "box", "rm"):
        waiting.start()
        time.sleep(0.3)
        instance.lock_file.unlink()
        instance.directory.rmdir()
    waiting.join(30)
    assert told == ["machine 'box' was removed meanwhile"]
