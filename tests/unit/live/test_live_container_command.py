"""`hostos container`: arguments, and what is refused before anything is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.cli import main
from hostos.cli.container import boot, split_at
from hostos.cli.live import fetched, resolve, urls_from_guest
from hostos.errors import UserError

CID = "bafybeic5xnzfkbbm2tgklrd6rmxhw25kqmvpv4rmssqje3sgburfuztmjm"
HASH = "ab" * 32
WORDS = st.lists(st.sampled_from(["--", "--nspawn", "-x", "a", ""]), max_size=8)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@given(WORDS)
def test_split_loses_nothing(words: list[str]) -> None:
    before, after = split_at(words, "--")
    assert "--" not in before
    assert before + (["--", *after] if "--" in words else []) == words


def parsed(*words: str) -> dict[str, object]:
    with click.Context(boot) as context:
        boot.parse_args(context, list(words))
        return context.params


def test_command_and_nspawn_options_are_left_alone() -> None:
    found = parsed(
        HASH, "--name", "web", "--nspawn", "--bind-ro=/x", "--capability=all", "--", "sh", "--name", "--", "x"
    )
    assert found["image"] == HASH
    assert found["name"] == "web"
    assert found["nspawn"] == ("--bind-ro=/x", "--capability=all")
    assert found["command"] == ("sh", "--name", "--", "x")


def test_nspawn_with_equals_sign_among_other_options() -> None:
    found = parsed("--nspawn=--tmpfs=/x", HASH, "--peer", "a:1", "--nspawn=--as-pid2")
    assert found["nspawn"] == ("--tmpfs=/x", "--as-pid2")
    assert found["peers"] == ("a:1",)
    assert found["command"] == ()


def test_nspawn_inside_the_command_is_a_word_of_it() -> None:
    assert parsed(HASH, "--", "echo", "--nspawn=x", "--nspawn")["command"] == ("echo", "--nspawn=x", "--nspawn")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["zz" * 32], "not an image"),
        (["12345"], "there is no image '12345' here"),
        (["ab" * 20], "v1 hash"),
        (["magnet:?xt=urn:btih:" + "ab" * 20], "v1 hash"),
        ([HASH], "no peer was named"),
        ([HASH, "--peer", "nonsense"], "not a peer's address"),
        (["no-such-name"], "there is no image"),
        ([HASH, "--peer", "a:1", "--name", "Not Good"], "not a usable container name"),
        ([HASH, "--peer", "a:1", "--bind", "relative"], "not something to bind"),
        ([HASH, "--peer", "a:1", "--size", "huge"], "not a size"),
        ([HASH, "--peer", "a:1", "--nspawn", "word"], "not an option of systemd-nspawn"),
        ([HASH, "--peer", "a:1", "--init", "--", "x"], "exclude each other"),
        ([HASH, "--peer", "a:1", "--network", "all"], "network"),
        ([CID, "--peer", "a:1"], "fetched from gateways"),
        ([CID, "--gateway", "127.0.0.1:8080"], "not the address of a server"),
        ([CID + "/etc"], "names something within it"),
        ([HASH, "--gateway", "http://127.0.0.1:8080"], "--gateway is for CIDs"),
        ([HASH, "--peer", "a:1", "--deadline", "0"], "deadline"),
    ],
)
def test_bad_input_ends_with_2_and_changes_nothing(
    arguments: list[str], why: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["container", "boot", *arguments])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert why in told.err
    assert told.out == ""
    assert not (home / "state").exists()


@pytest.mark.parametrize(
    "arguments", [["ls"], ["stats", "x"], ["stop", "x"], ["shell", "x"], ["logs", "x"], ["exec", "x", "true"]]
)
def test_commands_without_a_machine(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["container", *arguments])
    assert ended.value.code == 2
    assert "there is no machine 'default'" in capsys.readouterr().err


def test_magnet_link_brings_its_peers() -> None:
    wanted = resolve(f"magnet:?xt=urn:btmh:1220{HASH}&x.pe=10.1.2.3:99", ("host:1",))
    assert (wanted.image, wanted.peers, wanted.bundle) == (HASH, ("host:1", "10.1.2.3:99"), None)
    with pytest.raises(UserError, match="no peer"):
        resolve(f"magnet:?xt=urn:btmh:1220{HASH}", ())


def test_gateways_of_a_cid(home: Path) -> None:
    assert resolve(CID, ()).gateways == ("http://127.0.0.1:8080",)
    wanted = resolve(f"ipfs://{CID}", (), ("http://localhost:34343", "https://gateway.test/x"))
    assert (wanted.image, wanted.peers) == (CID, ())
    guest = SimpleNamespace(host_address_from_guest="10.0.2.2")
    seen = urls_from_guest(wanted.gateways, cast(Any, guest))
    assert seen == ["http://10.0.2.2:34343", "https://gateway.test:443/x"]


def test_share_of_an_image() -> None:
    assert fetched({"fetched": 5_000_000, "size": 100_000_000}) == "fetched 5.0 MB of 100.0 MB (5.0 %)"
