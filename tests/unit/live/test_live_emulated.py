"""Plain hashing is chosen for an emulated processor, before libcrypto is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostos.live.emulated import prefer_plain_code


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSSL_ia32cap", "")  # so that what the test leaves is taken back
    monkeypatch.delenv("OPENSSL_ia32cap")


def cpuinfo(place: Path, name: str) -> Path:
    file = place / "cpuinfo"
    file.write_text(f"processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: {name}\nflags\t\t: fpu avx2\n")
    return file


@pytest.mark.usefixtures("unset")
def test_an_emulated_processor(tmp_path: Path) -> None:
    assert prefer_plain_code(cpuinfo(tmp_path, "QEMU TCG CPU version 2.5+"))
    assert dict(os.environ)["OPENSSL_ia32cap"] == "~0x1000020000000000:~0x20000128"


def test_what_the_user_chose_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSSL_ia32cap", "~0x0")
    assert prefer_plain_code(cpuinfo(tmp_path, "QEMU TCG CPU version 2.5+"))
    assert dict(os.environ)["OPENSSL_ia32cap"] == "~0x0"


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("name", ["AMD EPYC 9R14", "Common KVM processor"])
def test_a_real_processor(name: str, tmp_path: Path) -> None:
    assert not prefer_plain_code(cpuinfo(tmp_path, name))
    assert not prefer_plain_code(tmp_path / "none")
    assert "OPENSSL_ia32cap" not in os.environ


def test_it_comes_before_libcrypto() -> None:
    """libcrypto reads the variable when it is loaded."""
    script = "import sys, hostos.live; print(sorted({'_hashlib', '_ssl', 'libtorrent'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
