from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.machine import accel
from hostos.machine.os_image import host_arch

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="KVM is Linux's")
HERE = host_arch()


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """CPU flags that promise everything, in a file that tests may change."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu vmx sse\n")
    monkeypatch.setattr(accel, "CPUINFO", cpuinfo)
    return cpuinfo


def test_auto_takes_tcg_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accel, "DEVICE", tmp_path / "kvm")
    choice = accel.choose("auto", HERE)
    assert choice.name == "tcg"
    assert "there is no" in choice.reason
    # A device node that is no KVM: opens, and knows no ioctl.
    (tmp_path / "kvm").write_bytes(b"")
    assert "creates no VM" in accel.choose("auto", HERE).reason
    with pytest.raises(UserError, match="creates no VM"):
        accel.choose("kvm", HERE)


@pytest.mark.skipif(bool(accel.kvm_device_fault()), reason="needs a /dev/kvm that answers")
class TestWithADevice:
    def test_good_flags_mean_kvm_until_proven_otherwise(self) -> None:
        choice = accel.choose("auto", HERE)
        assert (choice.name, choice.fallback) == ("kvm", True)

    @pytest.mark.skipif(HERE != "x86_64", reason="others show no such flags")
    def test_a_device_without_cpu_flags_is_not_believed(self, machine: Path) -> None:
        machine.write_text("flags : fpu sse\n")
        choice = accel.choose("auto", HERE)
        assert choice.name == "tcg"
        assert "neither vmx nor svm" in choice.reason
        # Who asks for it by name gets it, and the proof.
        assert accel.choose("kvm", HERE) == accel.Choice("kvm", "asked for")

    def test_a_failure_is_remembered_until_the_host_boots(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        accel.remember_fault("no guest ever ran")
        assert accel.choose("auto", HERE).name == "tcg"
        assert "no guest ever ran" in accel.choose("auto", HERE).reason
        other_boot = tmp_path / "boot_id"
        other_boot.write_text("another\n")
        monkeypatch.setattr(accel, "BOOT_ID", other_boot)
        assert accel.choose("auto", HERE).name == "kvm"

    def test_success_forgets(self) -> None:
        accel.remember_fault("no guest ever ran")
        accel.remember_fault("")
        assert accel.choose("auto", HERE).name == "kvm"

    @pytest.mark.skipif(os.getuid() == 0, reason="root may open everything")
    def test_a_closed_device(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        closed = tmp_path / "kvm"
        closed.touch(0)
        monkeypatch.setattr(accel, "DEVICE", closed)
        assert "group kvm" in accel.choose("auto", HERE).reason


def test_a_damaged_memory_is_ignored(home: Path) -> None:
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "accelerator.json").write_text("{")
    assert accel.remembered_fault() == ""


def test_foreign_guests_are_emulated() -> None:
    foreign = "aarch64" if HERE == "x86_64" else "x86_64"
    assert accel.choose("auto", foreign).name == "tcg"
    with pytest.raises(UserError, match="cannot run"):
        accel.choose("kvm", foreign)


def test_hvf_is_refused_here() -> None:
    with pytest.raises(UserError, match="macOS"):
        accel.choose("hvf", HERE)
