"""What differs between the architectures an OS is built for, and on which it is built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hostos.build import lock, os_build
from hostos.build.debian_archive import Archive, Package
from hostos.build.engines import Built, debian
from hostos.build.lock import Lock
from hostos.build.profile import load_profile
from hostos.build.render import linux_config
from hostos.build.tree import Tree
from hostos.errors import UserError


def package(name: str, arch: str = "arm64") -> Package:
    return Package(name, "1", arch, f"pool/{name}_{arch}.deb", 1, "0" * 64, name)


LOCK = Lock(
    "trixie",
    ("dash",),
    (package("dash"), package("libc6"), package("python3.13-minimal")),
    package("linux-source-6.12", "all"),
    {"x86_64": (package("libc6", "amd64"), package("python3.13-minimal", "amd64"))},
)


def test_the_guests_python_for_the_machine_that_builds() -> None:
    assert {each.arch for each in LOCK.python_for("x86_64")} == {"amd64"}
    native = LOCK.python_for("aarch64")
    assert [(each.name, each.arch) for each in native] == [("libc6", "arm64"), ("python3.13-minimal", "arm64")]


def test_a_lock_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    path.write_text(LOCK.to_json())
    assert lock.read(path) == LOCK
    older = json.loads(LOCK.to_json())
    del older["interpreter"]
    path.write_text(json.dumps(older))
    assert lock.read(path) == replace(LOCK, interpreter={})


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_the_committed_locks_hold_what_a_foreign_machine_needs(arch: str) -> None:
    profile = load_profile("default", arch)
    found = lock.read(lock.lock_file(profile))
    architectures = {each.arch for each in found.root}
    assert architectures == {"all", {"x86_64": "amd64", "aarch64": "arm64"}[arch]}
    versions = {each.name: each.version for each in found.root}
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[arch]
    foreign = found.python_for(other)
    assert "python3.13-minimal" in [each.name for each in foreign]
    assert {each.arch for each in foreign} == {{"x86_64": "amd64", "aarch64": "arm64"}[other]}
    for each in foreign:
        if "python3.13" in each.name:
            assert each.version == versions[each.name]


def test_a_lock_without_a_python_for_this_machine_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile("default", "aarch64")
    committed = replace(lock.read(lock.lock_file(profile)), interpreter={})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert lock._misfit(committed, profile) == "locked without a Python that runs on x86_64"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert lock._misfit(committed, profile) is None


def test_a_missing_cross_compiler_is_named_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for tool in ("make", "gcc", "ld"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(
        "shutil.which", lambda name, path=None: str(tmp_path / name) if (tmp_path / name).exists() else None
    )
    monkeypatch.setattr(lock, "obtain", lambda *args, **options: pytest.fail("it went on"))
    with pytest.raises(UserError, match="aarch64-linux-gnu-gcc, aarch64-linux-gnu-ld") as caught:
        debian.require_compiler("aarch64")
    assert "apt-get install binutils-aarch64-linux-gnu gcc-aarch64-linux-gnu" in str(caught.value.hint)
    debian.require_compiler("x86_64")


def test_the_kernels_of_both_differ_in_their_own_tables_alone() -> None:
    options = {}
    for arch in ("x86_64", "aarch64"):
        text = linux_config(load_profile("default", arch))
        options[arch] = {line for line in text.splitlines() if "CONFIG_" in line}
    common = options["x86_64"] & options["aarch64"]
    assert len(common) > 150
    arm = options["aarch64"] - common
    for wanted in (
        "CONFIG_SERIAL_AMBA_PL011_CONSOLE=y", "CONFIG_PCI_HOST_GENERIC=y", "CONFIG_RTC_DRV_PL031=y",
        "CONFIG_KEYBOARD_GPIO=y", "CONFIG_GPIO_PL061=y",
    ):  # fmt: skip
        assert wanted in arm
    assert not [line for line in options["aarch64"] if "ACPI" in line or "EFI=" in line]


def test_consoles() -> None:
    for name in ("default", "minimal"):
        assert load_profile(name, "x86_64").cmdline.startswith("console=ttyS0 ")
        assert load_profile(name, "aarch64").cmdline.startswith("console=ttyAMA0 ")


@pytest.mark.parametrize(("arch", "expected"), [("x86_64", ["bzImage", "vmlinux"]), ("aarch64", ["Image"])])
def test_kernels_to_boot(arch: str, expected: list[str], tmp_path: Path) -> None:
    built = Built("6.12", tmp_path / "image", tmp_path / "vmlinux", Tree(), ())
    assert [name for name, _ in os_build.kernel_files(arch, built)] == expected


def test_packages_are_resolved_for_the_guests_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a private apt that knows no other, whatever this machine is."""
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path))
    asked: list[list[str]] = []

    def run(command: list[str], **options: object) -> str:
        asked.append([str(word) for word in command])
        return "'http://mirror/pool/d/dash_1_arm64.deb' dash_1_arm64.deb 1 SHA256:00" if "install" in command else ""

    monkeypatch.setattr("hostos.build.debian_archive.run", run)
    monkeypatch.setattr(Archive, "_describe", lambda self, exact: [package("dash")])
    assert Archive("trixie", "aarch64").resolve(["dash"]) == [package("dash")]
    assert "APT::Architecture=arm64" in asked[0]
    assert "APT::Architectures=arm64" in asked[0]
