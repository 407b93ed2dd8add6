"""Machines of another architecture than the host's: which OS build, which QEMU, what is remembered."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.machine import launcher, os_image, plan
from hostos.machine.instance import Instance
from hostos.machine.kernel_command import EMULATED
from hostos.machine.options import UpOptions

ARM = {"arch": "aarch64", "cmdline": "console=ttyAMA0 quiet"}
IMAGE_FILES = {"Image": {"size": 2, "sha256": "0" * 64}, "initrd.gz": {"size": 2, "sha256": "0" * 64}}
MakeOs = Callable[..., Path]


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An x86 host with both QEMUs, in a directory without builds."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    programs = tmp_path / "bin"
    programs.mkdir()
    for arch in os_image.ARCHITECTURES:
        (programs / f"qemu-system-{arch}").write_text("#!/bin/sh\n")
        (programs / f"qemu-system-{arch}").chmod(0o755)
    monkeypatch.setenv("PATH", os.fspath(programs))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def make_arm(make_os: MakeOs) -> MakeOs:
    def make(directory: Path, name: str = "Image") -> Path:
        make_os(directory, **ARM, files=IMAGE_FILES)
        (directory / name).write_bytes(b"im")
        return directory

    return make


@pytest.fixture
def both(host: Path, make_os: MakeOs, make_arm: MakeOs) -> tuple[Path, Path]:
    return make_os(host / "dist/default-x86_64"), make_arm(host / "dist/default-aarch64")


def test_the_hosts_own_unless_told_otherwise(both: tuple[Path, Path]) -> None:
    x86, arm = both
    image, qemu = plan.choose_os(UpOptions())
    assert (image.directory, qemu.name) == (x86, "qemu-system-x86_64")
    image, qemu = plan.choose_os(UpOptions(arch="aarch64"))
    assert (image.directory, qemu.name) == (arm, "qemu-system-aarch64")
    # An Image whatever runs it: as an ELF it would get no device tree.
    assert {image.kernel(name).name for name in ("tcg", "kvm", "hvf")} == {"Image"}


def test_a_directory_says_what_it_is_for(both: tuple[Path, Path], host: Path) -> None:
    image, qemu = plan.choose_os(UpOptions(os=both[1]))
    assert (image.arch, qemu.name) == ("aarch64", "qemu-system-aarch64")
    with pytest.raises(UserError, match="is for aarch64, not for x86_64") as caught:
        plan.choose_os(UpOptions(os=both[1], arch="x86_64"))
    assert "--arch" in str(caught.value.hint)


def test_without_its_qemu_or_its_build_the_next_step_is_named(
    host: Path, make_os: MakeOs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no OS build for aarch64") as caught:
        plan.choose_os(UpOptions(arch="aarch64"))
    assert "invoke build --arch aarch64" in str(caught.value.hint)
    (tmp_path / "bin/qemu-system-aarch64").unlink()
    (tmp_path / "bin/apt-get").symlink_to(tmp_path / "bin/qemu-system-x86_64")
    with pytest.raises(UserError, match="qemu-system-aarch64 is not installed") as caught:
        plan.choose_os(UpOptions(arch="aarch64"))
    assert caught.value.hint == "apt-get install qemu-system-arm"


def test_an_arm_build_without_an_image_is_none(host: Path, make_os: MakeOs) -> None:
    directory = make_os(host / "dist/default-aarch64", arch="aarch64")
    with pytest.raises(UserError, match="no kernel"):
        os_image.load(directory)


def test_what_is_asked_for_replaces_what_is_remembered() -> None:
    remembered = UpOptions(os=Path("/os/default-x86_64"), memory_mib=512)
    assert UpOptions(arch="aarch64").over(remembered) == UpOptions(arch="aarch64", memory_mib=512)
    arm = UpOptions(arch="aarch64")
    assert UpOptions(memory_mib=700).over(arm) == UpOptions(arch="aarch64", memory_mib=700)
    assert UpOptions(os=Path("/os/x")).over(arm) == UpOptions(os=Path("/os/x"))
    assert UpOptions.from_json(arm.to_json()) == arm
    with pytest.raises(UserError, match="no architecture 'sparc'"):
        UpOptions(arch="sparc").check()


@pytest.mark.parametrize(("said", "means"), [("arm64", "aarch64"), ("AMD64", "x86_64"), ("aarch64", "aarch64")])
def test_other_names_of_the_same(said: str, means: str) -> None:
    assert os_image.canonical(said) == means


def test_a_plan_for_arm(both: tuple[Path, Path], tmp_path: Path) -> None:
    made = plan.make_plan(Instance.named("box"), UpOptions(arch="aarch64"), ())
    assert (made.accelerator.name, made.config.arch) == ("tcg", "aarch64")
    assert made.accelerator.reason == "an aarch64 guest on an x86_64 host is emulated"
    words = made.config.cmdline.split()
    assert words[0] == "console=ttyAMA0"
    assert set(EMULATED["aarch64"].split()) <= set(words)
    # The delay loop is the timer's, whose frequency is known.
    assert not any(word.startswith("lpj=") for word in words)


def test_the_architecture_of_a_machine_that_does_not_run(both: tuple[Path, Path], home: Path) -> None:
    assert launcher.architecture("box") == "x86_64"
    instance = Instance.named("box")
    instance.directory.mkdir(parents=True)
    launcher.write_json(instance.config_file, replace(UpOptions(), arch="aarch64").to_json())
    assert launcher.architecture("box") == "aarch64"
