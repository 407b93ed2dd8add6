from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.machine.accel import Name
from hostos.machine.network import Forward, Net
from hostos.machine.qemu import Config, Ram, command, find_qemu, shell_text

CONFIG = Config(
    binary=Path("/usr/bin/qemu-system-x86_64"),
    name="box",
    arch="x86_64",
    accelerator="tcg",
    cpus=2,
    memory_mib=512,
    kernel=Path("/os/vmlinux"),
    initrd=Path("/m/initrd"),
    cmdline="console=ttyS0 hostos.hostname=box",
    mac="52:54:00:01:02:03",
    forwards=(Forward(4022, 22), Forward(6999, 6881, "udp")),
    serial_log=Path("/m/serial.log"),
    console_socket=Path("/r/console.sock"),
    monitor_socket=Path("/r/monitor.sock"),
    agent_socket=Path("/r/agent.sock"),
    pid_file=Path("/m/qemu.pid"),
)

EXPECTED = """
/usr/bin/qemu-system-x86_64 -name hostos-box -nodefaults -no-user-config -display none
-machine q35 -m 512M -accel tcg,thread=multi -cpu max,-erms -smp 2
-kernel /os/vmlinux -initrd /m/initrd -append 'console=ttyS0 hostos.hostname=box'
-netdev user,id=net0,hostfwd=tcp:127.0.0.1:4022-:22,hostfwd=udp:127.0.0.1:6999-:6881
-device virtio-net-pci,netdev=net0,mac=52:54:00:01:02:03,romfile=
-object rng-builtin,id=rng0 -device virtio-rng-pci,rng=rng0
-chardev socket,id=agent,path=/r/agent.sock,server=on,wait=off
-device virtio-serial-pci -device virtserialport,chardev=agent,name=hostos.agent
-chardev socket,id=console,path=/r/console.sock,server=on,wait=off,logfile=/m/serial.log
-serial chardev:console
-chardev socket,id=monitor,path=/r/monitor.sock,server=on,wait=off -mon chardev=monitor,mode=control
-pidfile /m/qemu.pid -device vmgenid,guid=auto
"""


def test_exact_command_line() -> None:
    assert command(CONFIG) == shlex.split(EXPECTED)


def test_accelerated() -> None:
    line = command(replace(CONFIG, accelerator="kvm"))
    assert line[line.index("-accel") + 1] == "kvm"
    assert line[line.index("-cpu") + 1] == "host"


ARM = """
/usr/bin/qemu-system-aarch64 -name hostos-box -nodefaults -no-user-config -display none
-machine virt,gic-version={gic} -m 512M -accel {accel} -cpu {cpu} -smp 2
-kernel /os/Image -initrd /m/initrd -append 'console=ttyAMA0 hostos.hostname=box'
-netdev {netdev}
-device virtio-net-pci,netdev=net0,mac=52:54:00:01:02:03,romfile=
-object rng-builtin,id=rng0 -device virtio-rng-pci,rng=rng0
-chardev socket,id=agent,path=/r/agent.sock,server=on,wait=off
-device virtio-serial-pci -device virtserialport,chardev=agent,name=hostos.agent
-chardev socket,id=console,path=/r/console.sock,server=on,wait=off,logfile=/m/serial.log
-serial chardev:console
-chardev socket,id=monitor,path=/r/monitor.sock,server=on,wait=off -mon chardev=monitor,mode=control
-pidfile /m/qemu.pid
"""
ARM_CONFIG = replace(
    CONFIG,
    binary=Path("/usr/bin/qemu-system-aarch64"),
    arch="aarch64",
    kernel=Path("/os/Image"),
    cmdline="console=ttyAMA0 hostos.hostname=box",
)
USER = "user,id=net0,hostfwd=tcp:127.0.0.1:4022-:22,hostfwd=udp:127.0.0.1:6999-:6881"


@pytest.mark.parametrize(
    ("accelerator", "gic", "accel", "cpu"),
    [
        ("tcg", "3", "tcg,thread=multi", "max,pauth-impdef=on"),
        ("kvm", "max", "kvm", "host"),
        ("hvf", "max", "hvf", "host"),
    ],
)
def test_exact_command_line_of_arm(accelerator: Name, gic: str, accel: str, cpu: str) -> None:
    expected = ARM.format(gic=gic, accel=accel, cpu=cpu, netdev=USER)
    assert command(replace(ARM_CONFIG, accelerator=accelerator)) == shlex.split(expected)


def test_exact_command_line_of_a_mac_with_vmnet() -> None:
    config = replace(ARM_CONFIG, accelerator="hvf", net=Net("vmnet"), forwards=())
    expected = ARM.format(gic="max", accel="hvf", cpu="host", netdev="vmnet-shared,id=net0")
    assert command(config) == shlex.split(expected)
    daemon = replace(config, vmnet_daemon=Path("/opt/homebrew/var/run/socket_vmnet"))
    line = command(daemon)
    path = "/opt/homebrew/var/run/socket_vmnet"
    assert line[line.index("-netdev") + 1] == f"stream,id=net0,server=off,addr.type=unix,addr.path={path}"
    intel = replace(CONFIG, accelerator="hvf", net=Net("vmnet"), forwards=())
    line = command(intel)
    assert (line[line.index("-machine") + 1], line[line.index("-cpu") + 1]) == ("q35", "host")


def test_memory_in_a_file_keeps_the_machine() -> None:
    line = command(replace(ARM_CONFIG, ram=Ram(Path("/t/ram"), private=True), incoming=True))
    assert line[line.index("-machine") + 1] == "virt,gic-version=3,memory-backend=ram"
    assert "-kernel" not in line


def test_commas_in_paths_stay_part_of_the_path() -> None:
    line = command(replace(CONFIG, monitor_socket=Path("/r,x=y/monitor.sock"), serial_log=Path("/a,b")))
    assert "socket,id=monitor,path=/r,,x=y/monitor.sock,server=on,wait=off" in line
    assert any(word.endswith("logfile=/a,,b") for word in line)


def test_shell_text_is_the_same_command() -> None:
    line = command(replace(CONFIG, initrd=Path("/with space/it's"), cmdline="a b $HOME `x`"))
    assert shlex.split(shell_text(line).replace("\\\n", "")) == line


def test_missing_qemu_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(UserError, match="qemu-system-x86_64 is not installed") as caught:
        find_qemu("x86_64")
    assert caught.value.hint == "apt-get install qemu-system-x86"
