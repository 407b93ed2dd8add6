"""Completion in the shells themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A home with two machines and an image, and `hostos` in PATH."""
    for name in ("alpha", "beta"):
        (tmp_path / "home" / "state" / "machines" / name).mkdir(parents=True)
    image = tmp_path / "home" / "data" / "images" / ("ab" * 32)
    image.mkdir(parents=True)
    (image / "manifest.json").write_text(json.dumps({"name": "web/debian"}))
    (tmp_path / "home" / "data" / "images" / "broken").mkdir()
    program = tmp_path / "hostos"
    program.write_text(f"#!{sys.executable}\nfrom hostos.cli import main\nmain()\n")
    program.chmod(0o755)
    return tmp_path


def shell(place: Path, *command: str) -> str:
    environment = {**os.environ, "HOSTOS_HOME": str(place / "home"), "PATH": f"{place}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ssh-"], ["ssh-config"]),
        (["status", "-m", ""], ["alpha", "beta"]),
        (["console", "--machine", "b"], ["beta"]),
        (["container", "boot", "w"], ["web/debian"]),
        (["container", "boot", "abab"], ["ab" * 32]),
        (["config", "set", "machine.c"], ["machine.cpus"]),
        (["config", "set", "machine.accel", "k"], ["kvm"]),
        (["up", "--dry"], ["--dry-run"]),
    ],
)
def test_bash(place: Path, words: list[str], offered: list[str]) -> None:
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    quoted = " ".join(f"'{word}'" for word in words)
    script = f"""
eval "$(hostos completion bash)"
COMP_WORDS=(hostos {quoted}) COMP_CWORD={len(words)}
_hostos_completion hostos "${{COMP_WORDS[COMP_CWORD]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    assert shell(place, "bash", "-c", script).split() == offered


def test_fish(place: Path) -> None:
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    script = "hostos completion fish | source; complete -C 'hostos status -m a'; complete -C 'hostos container boot w'"
    assert [line.split("\t")[0] for line in shell(place, "fish", "-c", script).splitlines()] == ["alpha", "web/debian"]


def test_zsh(place: Path) -> None:
    if not shutil.which("zsh"):
        pytest.skip("zsh is not installed")
    # What compadd would be given, without a terminal to press Tab on.
    script = """
compdef() { :; }
eval "$(hostos completion zsh)"
words=(hostos status -m a) CURRENT=4
compadd() { print -l -- ${(P)@[-1]}; }
_describe() { print -l -- ${(P)@[-1]}; }
commands[hostos]=1
_hostos_completion
"""
    assert "alpha" in shell(place, "zsh", "-f", "-c", script).split()


def test_a_tab_does_not_wait(place: Path) -> None:
    """Nothing heavy is imported: libtorrent, paramiko and qemu.qmp take longer than a Tab may."""
    program = """
import sys
from hostos.cli import main
try:
    main()
finally:
    heavy = {"libtorrent", "paramiko", "qemu", "cryptography", "jinja2"} & set(sys.modules)
    print("HEAVY", *heavy)
"""
    environment = {"COMP_WORDS": "hostos container boot w", "COMP_CWORD": "3", "_HOSTOS_COMPLETE": "bash_complete"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = 'hostos'\n{program}"],
        env={**os.environ, **environment, "HOSTOS_HOME": str(place / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["plain,web/debian", "HEAVY"]
    assert time.monotonic() - began < 5
