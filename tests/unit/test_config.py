"""config.toml: checked, changed without losing what people wrote, and taken where nobody says otherwise."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos import config, config_file
from hostos.cli import main
from hostos.errors import UserError
from hostos.machine import configured, plan
from hostos.machine.instance import Instance
from hostos.machine.options import UpOptions, timeout_scale

Run = Callable[..., tuple[int, str, str]]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJwTUwWq+WG3lLW6m6oX2fsfs5bW5sZEUl2yVCMw3Gp+ me"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="h-") as place:
        monkeypatch.setenv("HOSTOS_HOME", place)
        monkeypatch.delenv("HOSTOS_TIMEOUT_SCALE", raising=False)
        yield Path(place)


@pytest.fixture
def hostos(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(list(words))
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return run


def write(text: str) -> None:
    config.path().parent.mkdir(parents=True, exist_ok=True)
    config.path().write_text(text)


def values(key: config.Key) -> st.SearchStrategy[Any]:
    if key.choices:
        return st.sampled_from(key.choices)
    if key.kind == "integer":
        return st.integers(int(key.least), int(key.most))
    if key.kind == "number":
        return st.floats(key.least, key.most)
    text = st.text(min_size=1).filter(lambda each: each.isprintable())
    return st.lists(text) if key.kind == "list" else text


@given(st.fixed_dictionaries({}, optional={name: values(key) for name, key in config.KEYS.items()}))
def test_what_is_set_is_read(settings: dict[str, Any]) -> None:
    config.path().unlink(missing_ok=True)
    for name, value in settings.items():
        config_file.set_value(name, value)
    assert config.load() == settings
    for name, value in settings.items():
        assert config.get(name) == value
        assert config_file.unset(name)
    assert config.load() == {}


def test_comments_and_order_stay(hostos: Run) -> None:
    write("# mine\n[machine]\n# not too much\nmemory = 512  # MiB\ncpus = 1\n\n[talk]\nlevel = 'quiet'\n")
    assert hostos("config", "set", "machine.memory", "768")[0] == 0
    assert hostos("config", "set", "timeouts.scale", "2.5")[0] == 0
    text = config.path().read_text()
    assert text.startswith("# mine\n[machine]\n# not too much\nmemory = 768  # MiB\ncpus = 1\n")
    assert "[timeouts]\nscale = 2.5\n" in text
    assert hostos("config", "get", "machine.memory")[1] == "768\n"
    listed = {each["key"]: each for each in json.loads(hostos("config", "list", "--json")[1])["keys"]}
    assert (listed["machine.memory"]["value"], listed["machine.memory"]["set"]) == (768, True)
    assert listed["machine.accel"]["set"] is False
    assert set(listed) == set(config.KEYS)
    assert "* machine.memory" in hostos("config", "list")[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["set", "machine.memry", "5"], "did you mean machine.memory?"),
        (["set", "memory", "5"], "did you mean machine.memory?"),
        (["set", "machine.memory", "much"], "an integer from 1"),
        (["set", "machine.memory", "1", "2"], "takes one value"),
        (["set", "machine.cpus", "65"], "an integer from 1 to 64"),
        (["set", "machine.accel", "warp"], "one of auto, kvm"),
        (["set", "timeouts.scale", "nan"], "a number from 0.01"),
        (["get", "nothing"], "hostos config list"),
        (["unset", "nothing"], "hostos config list"),
    ],
)
def test_slips(hostos: Run, words: list[str], says: str) -> None:
    status, _, err = hostos("config", *words)
    assert status == 2
    assert says in err
    assert "Traceback" not in err
    assert not config.path().exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("memory = 5", "outside of a table"),
        ("[machine]\nmemory = '5'", "an integer"),
        ("[machine]\nmemory = true", "an integer"),
        ("[machine]\nkeys = 'a.pub'", "a list"),
        ("[machine]\nmemroy = 5", "did you mean machine.memory"),
        ("[machine\n", "is not TOML"),
        ("\xff", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_meant_is_named_and_can_be_mended(hostos: Run, text: str, says: str) -> None:
    write(text)
    with pytest.raises(UserError, match=says) as caught:
        config.load()
    assert str(config.path()) in str(caught.value) or "config" in caught.value.hint
    status, _, err = hostos("config", "list")
    assert (status, "Traceback" in err) == (2, False)
    # Commands that need no setting work on.
    assert hostos("ls")[0] == 0


def test_edit_opens_an_editor_and_checks(hostos: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUAL", "sed -i -e '$ a [machine]\\nmemory = 77'")
    assert hostos("config", "edit")[0] == 0
    assert config.get("machine.memory") == 77
    monkeypatch.setenv("VISUAL", "sed -i -e s/77/many/")
    status, _, err = hostos("config", "edit")
    assert (status, "is not TOML" in err) == (2, True)
    monkeypatch.setenv("VISUAL", "/no/such/editor")
    assert hostos("config", "edit")[0] == 2


def test_what_wins(home: Path, tmp_path: Path) -> None:
    """Typed, then remembered, then the file, then built in."""
    (tmp_path / "k.pub").write_text(KEY)
    write(f"[machine]\nmemory = 300\ncpus = 3\nkeys = ['{tmp_path}/k.pub']\n[timeouts]\nssh = 7\nstart = 99\nscale = 2")
    from_file = configured.up_options()
    remembered = UpOptions(memory_mib=400)
    assert UpOptions(cpus=1).over(remembered).over(from_file) == UpOptions((KEY,), 400, 1)
    deadlines = configured.deadlines(proof=True, total=None)
    assert (deadlines.banner, deadlines.login, deadlines.first_output, deadlines.total) == (7.0, 30.0, 8.0, 99)
    assert configured.deadlines(proof=False, total=5.0).total == 5.0
    assert timeout_scale() == 2.0
    write("[machine]\nkeys = ['/absent.pub']")
    with pytest.raises(UserError, match=r"machine.keys in .*: key file /absent.pub does not exist"):
        configured.up_options()


def test_the_file_is_not_remembered(
    home: Path, make_complete_os: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("[machine]\nmemory = 300\n")
    made = plan.make_plan(Instance.named("box"), UpOptions(cpus=1, os=make_complete_os(), accel="tcg"), (KEY,))
    assert made.config.memory_mib == 300
    assert made.options.memory_mib is None
    monkeypatch.setenv("HOSTOS_TIMEOUT_SCALE", "3")
    assert timeout_scale() == 3.0


@pytest.fixture
def make_complete_os(tmp_path: Path) -> Callable[[], Path]:
    def make() -> Path:
        contents = {"bzImage": b"bz", "initrd.gz": b"gz"}
        for name, data in contents.items():
            (tmp_path / name).write_bytes(data)
        manifest = {
            "schema": 1, "kind": "hostos-os", "profile": "p", "arch": "x86_64", "kernel_version": "6.12.1",
            "cmdline": "quiet", "min_memory_mib": 160, "files": {name: {"size": 2} for name in contents},
        }  # fmt: skip
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return tmp_path

    return make
