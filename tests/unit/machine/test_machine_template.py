from __future__ import annotations

import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hostos.errors import UserError
from hostos.machine import bake, qemu, template
from hostos.machine.clone import Person
from hostos.machine.network import Net
from hostos.machine.os_image import OsImage
from hostos.machine.qemu import Config
from hostos.machine.share import parse_share


@pytest.fixture
def image(tmp_path: Path) -> OsImage:
    place = tmp_path / "os"
    place.mkdir()
    for name in ("vmlinux", "initrd.gz"):
        (place / name).write_text(name)
    return OsImage(
        place, "default", "x86_64", "quiet", "6.12", 100, ("initrd.gz", "vmlinux"), ("network", template.ABILITY)
    )


@pytest.fixture
def config(tmp_path: Path, image: OsImage, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "home"))
    binary = tmp_path / "qemu-system-x86_64"
    binary.write_text("QEMU 7.2")
    machine = tmp_path / "m"
    return Config(
        binary=binary,
        name="box",
        arch="x86_64",
        accelerator="tcg",
        cpus=2,
        memory_mib=512,
        kernel=image.directory / "vmlinux",
        initrd=machine / "initrd",
        cmdline="quiet hostos.hostname=box norandmaps hostos.ssh_key=c2VjcmV0",
        mac="52:54:00:01:02:03",
        forwards=(),
        serial_log=machine / "serial.log",
        console_socket=machine / "console.sock",
        monitor_socket=machine / "monitor.sock",
        agent_socket=machine / "agent.sock",
        pid_file=machine / "qemu.pid",
    )


def test_one_template_serves_machines_that_differ_in_name_keys_and_ports(config: Config, image: OsImage) -> None:
    key = template.key_of(config, image)
    other = replace(
        config,
        name="other",
        cmdline="quiet hostos.hostname=other norandmaps",
        mac="52:54:00:00:00:01",
        serial_log=Path("/elsewhere/serial.log"),
        monitor_socket=Path("/elsewhere/monitor.sock"),
    )
    assert template.key_of(other, image) == key


@pytest.mark.parametrize(
    "change",
    [
        {"memory_mib": 513},
        {"cpus": 1},
        {"accelerator": "kvm"},
        {"cmdline": "quiet hostos.hostname=box"},
    ],
)
def test_whatever_else_differs_needs_another_template(config: Config, image: OsImage, change: dict[str, Any]) -> None:
    assert template.key_of(replace(config, **change), image) != template.key_of(config, image)


@pytest.mark.parametrize("file", ["vmlinux", "initrd.gz", "qemu-system-x86_64"])
def test_another_kernel_initrd_or_qemu_needs_another_template(config: Config, image: OsImage, file: str) -> None:
    path = config.binary if file.startswith("qemu") else image.directory / file
    key = template.key_of(config, image)
    assert template.key_of(config, image) == key
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    # As a restored backup: same size, same time.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert template.key_of(config, image) != key
    assert template.key_of(config, replace(image, cmdline="debug")) != template.key_of(config, image)


def test_why_not(config: Config, image: OsImage) -> None:
    assert template.why_not(config, image) is None
    assert "KVM" in str(template.why_not(replace(config, accelerator="kvm"), image))
    arm = replace(config, arch="aarch64")
    assert "generation ID" in str(template.why_not(arm, image))
    # One that renews its random numbers by itself needs none.
    assert template.why_not(arm, replace(image, announces=(*image.announces, template.RESEEDS))) is None
    assert "identity" in str(template.why_not(config, replace(image, announces=("network",))))
    assert "network" in str(template.why_not(replace(config, net=Net("bridge", "br0")), image))
    assert "gives memory back" in str(template.why_not(replace(config, reclaim=True), image))
    share = parse_share("/tmp:/mnt")
    assert "shares" in str(template.why_not(replace(config, shares=(share,)), image))


def test_the_template_knows_nothing_of_the_machine_it_is_made_for(config: Config, image: OsImage) -> None:
    words = " ".join(qemu.command(template.baking(config, image, Path("/t"))))
    for secret in ("box", "c2VjcmV0", "52:54:00:01:02:03", "hostfwd"):
        assert secret not in words
    assert "hostos.template" in words
    assert "share=on" in words


def test_a_clone_writes_nothing_into_its_template(config: Config, tmp_path: Path) -> None:
    made = make(tmp_path, "a" * 32)
    line = qemu.command(template.cloning(config, made))
    backend = line[line.index("-object") + 1]
    assert backend == f"memory-backend-file,id=ram,size=512M,mem-path={made.ram},share=off"
    assert line[line.index("-incoming") + 1] == "defer"
    assert not {"-kernel", "-initrd", "-append"} & set(line)


def make(tmp_path: Path, key: str, *, age: float = 0.0, size: int = 8192) -> template.Template:
    directory = template.templates_dir() / key
    directory.mkdir(mode=0o700, parents=True)
    directory.chmod(0o700)
    (directory / "ram").write_bytes(os.urandom(size))
    (directory / "state").write_bytes(b"state")
    path = directory / "template.json"
    path.write_text(json.dumps({"schema": 1, "made_at": 1.0, "memory_mib": 512}))
    os.utime(path, (1e9 - age, 1e9 - age))
    found = template.find(key)
    assert found is not None
    return found


@pytest.mark.usefixtures("config")
def test_half_a_template_or_somebody_elses_is_none(tmp_path: Path) -> None:
    assert template.find("a" * 32) is None
    made = make(tmp_path, "a" * 32)
    made.directory.chmod(0o755)
    assert template.find(made.key) is None
    made.directory.chmod(0o700)
    (made.directory / "template.json").write_text("{")
    assert template.find(made.key) is None
    assert template.all_templates() == []


@pytest.mark.usefixtures("config")
def test_those_not_used_for_longest_make_room(tmp_path: Path) -> None:
    made = [make(tmp_path, letter * 32, age=age, size=1 << 20) for letter, age in (("a", 30), ("b", 10), ("c", 20))]
    (template.templates_dir() / f".{'d' * 32}.part").mkdir()
    assert [each.key[0] for each in template.all_templates()] == ["b", "c", "a"]
    removed = template.prune(2 * made[0].disk_bytes)
    assert [each.key[0] for each in removed] == ["a"]
    template.mark_used(made[2])
    assert [each.key[0] for each in template.prune(0, keep="b" * 32)] == ["c"]
    assert [each.key[0] for each in template.all_templates()] == ["b"]


@pytest.mark.usefixtures("config")
def test_one_that_failed_is_remembered(tmp_path: Path) -> None:
    made = make(tmp_path, "a" * 32)
    template.mark_failed(made, "it said nothing")
    found = template.find(made.key)
    assert found is not None
    assert found.failed == "it said nothing"
    template.remove(found)
    assert template.find(made.key) is None
    # Nothing to mark, nothing to complain about.
    template.mark_failed(made, "again")


@pytest.mark.parametrize("text", ["", "512", "x", "-1"])
def test_the_limit(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(template.LIMIT_VARIABLE, text)
    if text in ("x", "-1"):
        with pytest.raises(UserError, match="MiB"):
            template.limit_bytes()
    else:
        assert template.limit_bytes() == (int(text) << 20 if text else template.DEFAULT_LIMIT)


@pytest.mark.parametrize("shell", ["sh", "busybox sh"])
def test_an_identity_arrives_as_it_is(shell: str, tmp_path: Path) -> None:
    """Read as the guest does it: cut off at the end mark, then by a shell."""
    keys = 'ssh-ed25519 AAAA Ann "the key" O\'Hara # $HOME `id` \\ é\nssh-rsa BBBB\n'
    who = Person("box1", "52:54:00:01:02:03", keys, "-----BEGIN\nx\n-----END\n", "ssh-ed25519 CC\n", "m", "b", "e")
    script = who.script()
    assert script.endswith(b"\n#end\n#end\n")
    (tmp_path / "identity").write_bytes(script)
    tell = f'. {shlex.quote(str(tmp_path / "identity"))}; printf \'%s|\' "$hostname" "$mac" "$authorized_keys"'
    tell += ' "$host_key" "$host_key_public" "$machine_id" "$boot_id" "$entropy"; test "$time" -gt 1700000000'
    try:
        done = subprocess.run([*shell.split(), "-c", tell], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip(f"no {shell} here")
    assert done.stdout == "".join(f"{value}|" for value in vars(who).values() if value != who.mac).replace(
        "box1|", f"box1|{who.mac}|"
    )


def test_zeros_take_no_room(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    content = bytes(1 << 20) + os.urandom(1 << 16) + bytes(3 << 20) + b"end"
    path.write_bytes(content)
    before = path.stat().st_blocks
    bake.dig_holes(path)
    assert path.read_bytes() == content
    if os.uname().sysname == "Linux":
        assert path.stat().st_blocks < before / 4
