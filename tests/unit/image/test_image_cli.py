"""`hostos image` and `hostos seed` as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hostos.cli import main
from hostos.errors import UserError
from hostos.image.publish import boot_config


def hostos(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from hostos.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_publish_prints_the_hash_and_nothing_else(home: Path, tree: Path) -> None:
    options = ["--command", "/usr/bin/prog --flag 'a b'", "--env", "B=2", "--env", "A=1=1", "--port", "80"]
    done = hostos("image", "publish", tree, "--name", "web/test", *options)
    assert done.returncode == 0, done.stderr
    image = done.stdout.removesuffix("\n")
    assert len(image) == 64
    assert set(image) <= set("0123456789abcdef")
    assert "pack" in done.stderr

    again = hostos("image", "publish", tree, "--name", "web/test", *reversed_env(options))
    assert again.stdout == done.stdout

    listed = json.loads(hostos("image", "ls", "--json").stdout)
    assert [item["image"] for item in listed["images"]] == [image]
    assert image[:16] in hostos("image", "ls").stdout

    shown = json.loads(hostos("image", "inspect", "web/test", "--json").stdout)
    assert shown["manifest"]["boot"] == {
        "command": ["/usr/bin/prog", "--flag", "a b"],
        "env": {"A": "1=1", "B": "2"},
        "ports": ["80/tcp"],
    }
    assert shown["seed"] is None
    assert "x.pe" not in shown["magnet"]

    started = hostos("seed", "start", "--json")
    assert started.returncode == 0, started.stderr
    seed = json.loads(started.stdout)
    address = f"127.0.0.1:{seed['port']}"
    shown = json.loads(hostos("image", "inspect", image[:8], "--json").stdout)
    assert shown["magnet"].endswith(f"&x.pe={address}")
    assert shown["layers"][0]["magnet"].endswith(f"&x.pe={address}")
    text = hostos("image", "inspect", image).stdout
    assert address in text
    assert shown["layers"][0]["hash"] in text
    status = json.loads(hostos("seed", "status", "--json").stdout)
    assert {torrent["hash"] for torrent in status["torrents"]} == {image, shown["layers"][0]["hash"]}

    assert hostos("seed", "stop").returncode == 0
    stopped = hostos("seed", "status", "--json")
    assert stopped.returncode == 1
    assert json.loads(stopped.stdout)["running"] is False

    assert hostos("image", "rm", image).returncode == 0
    assert json.loads(hostos("image", "ls", "--json").stdout)["images"] == []
    assert list((home / "data/layers").iterdir()) == []


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, in this process (a start of Python costs 0.3 s)."""
    with pytest.raises(SystemExit) as leaving:
        main(list(arguments))
    said = capsys.readouterr()
    assert isinstance(leaving.value.code, int)
    return leaving.value.code, said.out, said.err


def reversed_env(options: list[str]) -> list[str]:
    """The same options with the variables the other way round."""
    return [*options[:2], *options[4:6], *options[2:4], *options[6:]]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["absent", "--name", "x"], "absent does not exist"),
        (["TREE", "--name", "deadbeef"], "reads like a hash"),
        (["TREE", "--name", "../x"], "not a usable image name"),
        (["TREE", "--name", "x", "--env", "A"], "KEY=VALUE"),
        (["TREE", "--name", "x", "--env", "A=1", "--env", "A=2"], "set twice"),
        (["TREE", "--name", "x", "--port", "http"], "port"),
        (["TREE", "--name", "x", "--command", "'"], "--command"),
        (["TREE", "--name", "x", "--user", "a b"], "user"),
        (["TREE", "--name", "x", "--workdir", "srv"], "absolute path"),
        (["TREE", "--name", "x", "--arch", "vax"], "not known"),
        (["TREE", "--name", "x", "--piece-size", "48"], "piece size"),
        (["TREE"], "--name"),
    ],
)
def test_bad_input_changes_nothing(
    home: Path, tree: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    words = [str(tree) if word == "TREE" else word for word in arguments]
    status, out, err = run(capsys, "image", "publish", *words)
    assert status == 2
    assert complaint in err
    assert out == ""
    assert not (home / "data/images").exists()
    incoming = home / "data/incoming"
    assert not incoming.exists() or list(incoming.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["image", "inspect", "nothing"],
        ["image", "rm", "nothing"],
        ["seed", "start", "--listen", "nowhere"],
        ["seed", "start", "--upload-limit", "lots"],
    ],
)
def test_other_bad_input(home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("hostos: ")


def test_ctrl_c_leaves_nothing(home: Path, tree: Path) -> None:
    for number in range(40):
        (tree / f"big{number}").write_bytes(os.urandom(4 << 20))
    command = [
        sys.executable,
        "-c",
        "from hostos.cli import main; main()",
        "image",
        "publish",
        str(tree),
        "--name",
        "x",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 30
        while not list((home / "data").glob("incoming/*/layer.squashfs")):
            assert time.monotonic() < end
            time.sleep(0.01)
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert list((home / "data/incoming").iterdir()) == []
    assert not (home / "data/images").exists()
    assert [child for child in children if child.is_running()] == []


def test_words_of_a_command_line() -> None:
    boot = boot_config(command="sh -c 'echo $HOME'", ports=("53/udp", "80"))
    assert boot.command == ("sh", "-c", "echo $HOME")
    assert boot.ports == ("53/udp", "80/tcp")
    with pytest.raises(UserError, match="not a name"):
        boot_config(env=("A-B=1",))
