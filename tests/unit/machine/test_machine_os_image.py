from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.machine.options import UpOptions, check_memory
from hostos.machine.os_image import find, load

MakeOs = Callable[..., Path]


def test_what_is_booted(make_os: MakeOs) -> None:
    image = load(make_os())
    assert image.kernel("tcg").name == "vmlinux"
    assert image.kernel("kvm").name == "bzImage"
    assert image.initrd(1024).name == "initrd.cpio"
    assert image.cmdline == "console=ttyS0 quiet"


def test_a_small_machine_has_no_room_for_the_archive_beside_its_files(make_os: MakeOs) -> None:
    directory = make_os()
    with (directory / "initrd.cpio").open("wb") as file:
        file.truncate(70 << 20)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["initrd.cpio"]["size"] = 70 << 20
    (directory / "manifest.json").write_text(json.dumps(manifest))
    image = load(directory)
    assert image.initrd(160 + 70).name == "initrd.cpio"
    assert image.initrd(160 + 69).name == image.initrd(160).name == "initrd.gz"


def test_without_the_fast_files_the_plain_ones_are_booted(make_os: MakeOs) -> None:
    sizes = {"bzImage": {"size": 2}, "initrd.gz": {"size": 2}}
    image = load(make_os(files=sizes))
    assert image.kernel("tcg").name == "bzImage"
    assert image.initrd(1024).name == "initrd.gz"


@pytest.mark.parametrize("name", ["bzImage", "initrd.cpio"])
def test_half_built_directories_are_refused(make_os: MakeOs, name: str) -> None:
    directory = make_os()
    with (directory / name).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match=f"half-built: {name}") as caught:
        load(directory)
    assert "invoke build" in caught.value.hint
    (directory / name).unlink()
    with pytest.raises(UserError, match=f"half-built: {name}"):
        load(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished OS build"):
        load(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"schema": 2},
        {"files": {}},
        {"files": {"../../etc/passwd": {"size": 1}}},
        {"files": {"bzImage": {"size": "2"}, "initrd.gz": {"size": 2}}},
        {"files": []},
        {"cmdline": 7},
        {"min_memory_mib": None},
    ],
)
def test_strange_manifests_are_refused(make_os: MakeOs, change: dict[str, object]) -> None:
    with pytest.raises(UserError):
        load(make_os(**change))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
manifest_keys = st.sampled_from(
    ["schema", "kind", "files", "profile", "arch", "cmdline", "kernel_version", "min_memory_mib"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(manifest_keys, json_values, max_size=3))
def test_any_manifest_is_taken_or_refused_properly(make_os: MakeOs, changes: dict[str, object]) -> None:
    directory = make_os()
    manifest = json.loads((directory / "manifest.json").read_text()) | changes
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with contextlib.suppress(UserError):
        assert load(directory).directory == directory


def test_lookup_order(make_os: MakeOs, tmp_path: Path, home: Path) -> None:
    cwd = tmp_path / "work"
    cwd.mkdir()
    with pytest.raises(UserError, match="no OS build"):
        find(None, arch="x86_64", cwd=cwd)
    make_os(home / "data" / "os" / "default-x86_64")
    assert find(None, arch="x86_64", cwd=cwd).directory == home / "data" / "os" / "default-x86_64"
    make_os(cwd / "dist" / "minimal-x86_64")
    assert find(None, arch="x86_64", cwd=cwd).directory.name == "minimal-x86_64"
    make_os(cwd / "dist" / "rescue-x86_64")
    with pytest.raises(UserError, match="several"):
        find(None, arch="x86_64", cwd=cwd)
    make_os(cwd / "dist" / "default-x86_64")
    assert find(None, arch="x86_64", cwd=cwd).directory.name == "default-x86_64"
    named = make_os(tmp_path / "named")
    assert find(named, arch="x86_64", cwd=cwd).directory == named
    with pytest.raises(UserError, match="does not exist"):
        find(tmp_path / "absent", arch="x86_64", cwd=cwd)


def test_memory_below_the_floor_is_refused_with_the_floor(make_os: MakeOs) -> None:
    image = load(make_os())
    check_memory(160, image)
    with pytest.raises(UserError, match="at least 160 MiB"):
        check_memory(159, image)
    with pytest.raises(UserError, match="more than this host has"):
        check_memory(1 << 30, image)


@pytest.mark.parametrize(
    "options",
    [
        UpOptions(cpus=0),
        UpOptions(cpus=65),
        UpOptions(memory_mib=0),
        UpOptions(accel="xen"),
        UpOptions(hostname="a_b"),
        UpOptions(timeout=0.0),
        UpOptions(timeout=float("nan")),
    ],
)
def test_options_that_cannot_be_meant(options: UpOptions) -> None:
    with pytest.raises(UserError):
        options.check()
