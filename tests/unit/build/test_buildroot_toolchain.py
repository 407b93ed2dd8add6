"""The toolchain assembled from this machine's packages, for real."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hostos.build.engines import buildroot_toolchain
from hostos.build.profile import Value
from hostos.errors import UserError
from hostos.steps import Step

HEADERS = "toolchain/toolchain-external/toolchain-external-custom/Config.in.options"


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("dpkg-query") is None or shutil.which("g++") is None:
        pytest.skip("this machine has no Debian compiler packages")
    if os.uname().machine != "x86_64":
        pytest.skip("the wrapper's compiler is that of x86_64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSTOS_HOME", str(tmp_path_factory.mktemp("home")))
        path, packages = buildroot_toolchain.assemble("x86_64", Step("test", lambda event: None))
    assert "libc6-dev" in packages
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """As much of a Buildroot tree as says which kernel headers it knows."""
    (tmp_path / HEADERS).parent.mkdir(parents=True)
    lines = [f"config BR2_TOOLCHAIN_EXTERNAL_HEADERS_{each}\n" for each in ("5_10", "6_1", "99_1")]
    (tmp_path / HEADERS).write_text("".join(lines))
    return tmp_path


def test_it_compiles_without_anything_outside(assembled: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(assembled, moved, symlinks=True)
    program = tmp_path / "x.cc"
    program.write_text("#include <iostream>\nint main() { std::cout << __GLIBC__; }\n")
    command = [moved / "bin/x86_64-linux-gnu-g++", program, "-o", tmp_path / "x", "-v", "-Wl,-t"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used = [line for line in done.stdout.splitlines() if line.startswith(("/usr/", "/lib"))]
    assert any(str(moved) in line for line in done.stdout.splitlines())
    assert used == []
    assert subprocess.run([tmp_path / "x"], capture_output=True, text=True, check=True).stdout == "2"


def test_the_sysroot_has_no_dead_links(assembled: Path) -> None:
    sysroot = assembled / "sysroot"
    assert (sysroot / "usr/lib/libc.a").is_file()
    assert (sysroot / "lib/ld-linux-x86-64.so.2").is_file()
    assert [path for path in sysroot.rglob("*") if path.is_symlink() and not path.exists()] == []
    assert "x86_64-linux-gnu" not in (sysroot / "usr/lib/libc.so").read_text()


def test_gcc_ar_finds_its_plugin_through_a_link(assembled: Path, tmp_path: Path) -> None:
    """Buildroot links to the compiler's programs from its own host directory."""
    link = tmp_path / "x86_64-linux-gnu-gcc-ar"
    link.symlink_to(assembled / "bin/x86_64-linux-gnu-gcc-ar")
    (tmp_path / "empty.o").write_bytes(b"")
    subprocess.run([link, "rc", tmp_path / "x.a", tmp_path / "empty.o"], check=True)


def test_it_is_described_as_it_is(assembled: Path, tree: Path) -> None:
    found: dict[str, Value] = {
        option.symbol: option.value for option in buildroot_toolchain.describe(assembled, tree, "x86_64")
    }
    number = subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    assert found["TOOLCHAIN_EXTERNAL_PATH"] == str(assembled)
    assert found["TOOLCHAIN_EXTERNAL_CUSTOM_PREFIX"] == "x86_64-linux-gnu"
    assert found[f"TOOLCHAIN_EXTERNAL_GCC_{number.partition('.')[0]}"] is True
    assert found["TOOLCHAIN_EXTERNAL_CXX"] is True
    assert "TOOLCHAIN_EXTERNAL_HEADERS_99_1" not in found
    assert any(symbol.startswith("TOOLCHAIN_EXTERNAL_HEADERS_") for symbol in found)


def test_a_directory_without_a_compiler_is_refused(tmp_path: Path, tree: Path) -> None:
    with pytest.raises(UserError, match="holds no compiler for x86_64"):
        buildroot_toolchain.describe(tmp_path, tree, "x86_64")


def test_a_compiler_for_another_machine_is_not_assembled() -> None:
    other = "aarch64" if os.uname().machine == "x86_64" else "x86_64"
    with pytest.raises(UserError, match="not one for"):
        buildroot_toolchain.assemble(other, Step("test", lambda event: None))
