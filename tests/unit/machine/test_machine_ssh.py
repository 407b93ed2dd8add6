"""ssh and scp command lines, ssh_config for everybody, logs. (With a guest: tests/boot.)"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.machine import ssh_include
from hostos.machine.console import parse_key
from hostos.machine.copy import Place, parse_place, scp_command
from hostos.machine.identity import ensure_identity
from hostos.machine.instance import Instance
from hostos.machine.logs import show
from hostos.machine.ssh import all_machines_config, ssh_command, write_ssh_config
from hostos.machine.ssh_words import SshWords, split


@pytest.mark.parametrize(
    ("line", "machine", "options", "command"),
    [
        ("", None, "", ""),
        ("uptime -p", None, "", "uptime -p"),
        ("-- -x", None, "", "-x"),
        ("-m box", "box", "", ""),
        ("-mbox ls", "box", "", "ls"),
        ("--machine=box -- ls", "box", "", "ls"),
        ("-L 8080:localhost:80 -N", None, "-L 8080:localhost:80 -N", ""),
        ("-L8080:localhost:80 ls -l", None, "-L8080:localhost:80", "ls -l"),
        ("-NL 8080:localhost:80", None, "-NL 8080:localhost:80", ""),
        ("-A -m box -R 1:a:2 -- a -m b", "box", "-A -R 1:a:2", "a -m b"),
        ("-vvvT -oLogLevel=QUIET id", None, "-vvvT -oLogLevel=QUIET", "id"),
    ],
)
def test_whose_word_it_is(line: str, machine: str | None, options: str, command: str) -> None:
    assert split(line.split()) == SshWords(machine, tuple(options.split()), tuple(command.split()))


@pytest.mark.parametrize("line", ["-m", "-L", "-NL", "-F x", "-aF x", "--verbose", "-Z", "-5"])
def test_what_ssh_would_not_take(line: str) -> None:
    with pytest.raises(UserError):
        split(line.split())


@given(st.lists(st.text(min_size=1).filter(lambda word: word != "--"), min_size=1))
def test_after_two_hyphens_every_word_is_the_guests(words: list[str]) -> None:
    assert split(["-A", "--", *words]).command == tuple(words)


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("-A", True),
        ("-tA", True),
        ("-o ForwardAgent=yes", True),
        ("-oForwardAgent=$SSH_AUTH_SOCK", True),
        ("-o forwardagent=no", False),
        ("-a", False),
        ("-L A:b:1", False),
        ("-lA", False),
        ("-- -A", False),
    ],
)
def test_the_agent_is_forwarded_only_when_asked(home: Path, line: str, asked: bool) -> None:
    words = split(line.split())
    assert words.forwards_agent == asked
    if shutil.which("ssh"):
        command = ssh_command(Instance.named("box"), words)
        assert ("IdentityAgent=SSH_AUTH_SOCK" in command) == asked


def test_which_side_a_path_is_on() -> None:
    assert parse_place("a/b", "box") == Place(None, "a/b")
    assert parse_place("./a:b", "box") == Place(None, "./a:b")
    assert parse_place(":", "box") == Place("box", "")
    assert parse_place(":/a:b", "box") == Place("box", "/a:b")
    assert parse_place("two:x y", "box") == Place("two", "x y")


@pytest.mark.skipif(not shutil.which("scp"), reason="needs the OpenSSH client")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["one"], "what shall be copied where"),
        (["/etc/passwd", "/tmp"], "both sides are on this host"),
        (["/absent", ":"], "/absent does not exist"),
        (["/etc", ":"], "/etc is a directory"),
        (["/etc/passwd", ":"], "no machine 'box'"),
        (["/etc/passwd", "No Name:"], "cannot name a machine"),
    ],
)
def test_copies_that_cannot_be(home: Path, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        scp_command(words, "box", recursive=False, preserve=False, quiet=False)
    assert caught.value.hint
    assert not home.exists()


def test_ssh_itself_reads_the_file_of_all_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not shutil.which("ssh"):
        pytest.skip("needs the OpenSSH client")
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / 'a "home", 100%'))
    for number, name in enumerate(("one", "two")):
        instance = Instance.named(name)
        instance.directory.mkdir(parents=True)
        write_ssh_config(instance, ensure_identity(instance.identity_dir, name), 2200 + number)

    def resolved(config: Path, host: str) -> dict[str, str]:
        done = subprocess.run(["ssh", "-G", "-F", config, host], capture_output=True, text=True, check=True)
        return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)

    assert resolved(all_machines_config(), "hostos-one")["port"] == "2200"
    # A guest that reboots closes nothing: a session must not wait for it for ever.
    assert resolved(all_machines_config(), "hostos-one")["serveraliveinterval"] == "10"
    assert resolved(all_machines_config(), "hostos-one")["connecttimeout"] == "60"
    assert resolved(all_machines_config(), "hostos-two")["port"] == "2201"

    user = tmp_path / "dotfiles"
    user.write_text("Host example\n  User ann\n")
    link = tmp_path / "config"
    link.symlink_to(user)
    assert ssh_include.install(link)
    assert not ssh_include.install(link)
    assert link.is_symlink()
    assert resolved(user, "hostos-two")["port"] == "2201"
    assert resolved(user, "example")["user"] == "ann"
    assert ssh_include.remove(link)
    assert not ssh_include.remove(link)
    assert user.read_text() == "Host example\n  User ann\n"


def test_keys_to_detach_with() -> None:
    assert parse_key("ctrl-]") == parse_key("^]") == b"\x1d"
    assert parse_key("Ctrl-A") == b"\x01"
    for wrong in ("", "a", "ctrl-", "ctrl-1", "alt-x", "ctrl-ab"):
        with pytest.raises(UserError):
            parse_key(wrong)


@given(st.binary(max_size=400).map(lambda data: data.replace(b"\r", b"\n")), st.integers(0, 9))
def test_the_last_lines(tmp_path_factory: pytest.TempPathFactory, data: bytes, lines: int) -> None:
    from hostos.machine.logs import _seek_last_lines

    path = tmp_path_factory.getbasetemp() / "log"
    path.write_bytes(data)
    with path.open("rb") as stream:
        _seek_last_lines(stream, lines)
        assert stream.read() == b"".join(data.splitlines(keepends=True)[-lines:] if lines else [])


def test_a_log_of_a_machine_that_does_not_run_ends(capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"one\ntwo\nthree")
    show(Instance.named("box"), tmp_path / "log", lines=2, follow=True)
    assert capfdbinary.readouterr().out == b"two\nthree"
    with pytest.raises(FileNotFoundError):
        show(Instance.named("box"), tmp_path / "absent", lines=None, follow=True)
