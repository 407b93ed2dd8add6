from __future__ import annotations

import io
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos import cpio
from hostos.machine.files import Unreadable, read_json, write_atomic, write_json
from hostos.machine.identity import (
    combine_initrd,
    ensure_identity,
    ensure_key_pair,
    existing_user_key,
    instance_archive,
    user_key_pair,
)
from hostos.machine.instance import Instance
from hostos.machine.network import Forward
from hostos.machine.options import UpOptions
from hostos.machine.ssh import ssh_command, ssh_config
from hostos.machine.ssh_words import split


def test_an_identity_is_made_once_and_its_host_key_pinned(tmp_path: Path) -> None:
    one = ensure_identity(tmp_path / "identity", "box")
    assert ensure_identity(tmp_path / "identity", "box") == one
    assert one.control.line != one.host.line
    for pair in (one.control, one.host):
        assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600
    assert one.known_hosts.read_text() == f"hostos-box {' '.join(one.host.line.split()[:2])}\n"


def test_openssh_takes_the_keys(tmp_path: Path) -> None:
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed")
    pair = ensure_key_pair(tmp_path / "key", "me")
    shown = subprocess.run(
        ["ssh-keygen", "-y", "-f", pair.private], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout
    assert shown.split()[:2] == pair.line.split()[:2]


@pytest.mark.parametrize("damage", ["private missing", "public missing", "private cut", "public cut"])
def test_a_pair_that_is_not_whole_is_made_anew(tmp_path: Path, damage: str) -> None:
    pair = ensure_key_pair(tmp_path / "key", "me")
    target = pair.private if damage.startswith("private") else tmp_path / "key.pub"
    if damage.endswith("missing"):
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[:10])
    again = ensure_key_pair(tmp_path / "key", "me")
    assert again.line != pair.line
    assert ensure_key_pair(tmp_path / "key", "me") == again


def test_without_a_key_one_is_made_for_all_machines() -> None:
    assert existing_user_key() is None
    pair = user_key_pair()
    assert existing_user_key() == pair.line == user_key_pair().line


@pytest.mark.skipif(not shutil.which("cpio"), reason="GNU cpio is not installed")
def test_the_archive_holds_the_contract(tmp_path: Path) -> None:
    identity = ensure_identity(tmp_path / "identity", "box")
    keys = ['ssh-ed25519 AAAA "quoted" comment', "ssh-rsa BBBB"]
    archive = instance_archive(identity, "host1", keys)
    assert archive == instance_archive(identity, "host1", keys)
    assert len(archive) % 4 == 0
    into = tmp_path / "root"
    into.mkdir()
    subprocess.run(
        ["cpio", "-id", "--quiet", "--no-absolute-filenames"], input=archive, cwd=into, check=True, capture_output=True
    )
    place = into / "etc/hostos/instance"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert (place / "hostname").read_text() == "host1\n"
    assert (place / "authorized_keys").read_text().splitlines() == [identity.control.line, *keys]
    assert (place / "ssh_host_ed25519_key").read_bytes() == identity.host.private.read_bytes()
    assert stat.S_IMODE((place / "ssh_host_ed25519_key").stat().st_mode) == 0o600
    assert (place / "ssh_host_ed25519_key.pub").read_text() == identity.host.line + "\n"


@pytest.mark.parametrize("length", range(8))
def test_archives_are_kept_apart_and_aligned(tmp_path: Path, length: int) -> None:
    os_initrd = tmp_path / "initrd.gz"
    os_initrd.write_bytes(b"\xff" * length)
    out = io.BytesIO()
    cpio.write_newc([cpio.file("f", b"x")], out)
    combine_initrd(os_initrd, out.getvalue(), tmp_path / "initrd")
    combined = (tmp_path / "initrd").read_bytes()
    start = combined.index(cpio.MAGIC)
    assert combined[:length] == b"\xff" * length
    assert start % 4 == 0
    assert combined[length:start] == bytes(start - length)
    assert start - length >= 4
    assert combined[start:] == out.getvalue()


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"one")
    write_atomic(path, b"two", 0o644)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"schema": 2}', "[" * 100000])
def test_damaged_json_is_unreadable_not_a_crash(tmp_path: Path, content: str) -> None:
    (tmp_path / "f").write_text(content)
    with pytest.raises(Unreadable):
        read_json(tmp_path / "f")
    assert read_json(tmp_path / "absent") is None


forwards = st.builds(
    Forward,
    st.integers(1, 65535),
    st.integers(1, 65535),
    st.sampled_from(["tcp", "udp"]),
    st.sampled_from(["127.0.0.1", "0.0.0.0"]),
)
options = st.builds(
    UpOptions,
    keys=st.none() | st.lists(st.text(), max_size=3).map(tuple),
    memory_mib=st.none() | st.integers(1, 10**6),
    cpus=st.none() | st.integers(1, 64),
    os=st.none() | st.just(Path("/some/os")),
    accel=st.none() | st.sampled_from(["auto", "tcg"]),
    hostname=st.none() | st.just("box"),
    publish=st.none() | st.lists(forwards, max_size=3, unique_by=lambda f: (f.protocol, f.host_port)).map(tuple),
)


@given(options)
def test_options_are_remembered_as_they_were(given_options: UpOptions) -> None:
    import json

    text = json.dumps(given_options.to_json())
    assert UpOptions.from_json(json.loads(text)) == given_options


@given(
    st.dictionaries(
        st.sampled_from(["keys", "cpus", "os", "accel", "publish", "hostname"]),
        st.none() | st.text(max_size=3) | st.integers() | st.lists(st.integers(), max_size=2),
    )
)
def test_damaged_options_are_unreadable_not_a_crash(content: dict[str, object]) -> None:
    try:
        UpOptions.from_json(content)
    except Unreadable:
        return


def test_given_options_go_over_remembered_ones() -> None:
    remembered = UpOptions(memory_mib=512, cpus=1, hostname="old")
    assert UpOptions(cpus=4).over(remembered) == UpOptions(memory_mib=512, cpus=4, hostname="old")


def test_options_that_cannot_be_meant_are_not_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "f", {"cpus": 0})
    with pytest.raises(Unreadable):
        UpOptions.from_json(read_json(tmp_path / "f") or {})


@pytest.mark.skipif(not shutil.which("ssh"), reason="ssh is not installed")
@pytest.mark.parametrize("odd", ["plain", "with space", "100%h", 'quo"te', "back\\slash"])
def test_ssh_reads_the_ssh_config_as_meant(tmp_path: Path, odd: str) -> None:
    identity = ensure_identity(tmp_path / odd, "box")
    config = tmp_path / "ssh_config"
    config.write_text(ssh_config(identity, "127.0.0.1", 4022))
    shown = subprocess.run(
        ["ssh", "-G", "-F", config, "hostos-box"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    resolved = dict(line.split(" ", 1) for line in shown if " " in line)
    assert resolved["hostname"] == "127.0.0.1"
    assert resolved["port"] == "4022"
    assert resolved["user"] == "root"
    assert resolved["hostkeyalias"] == "hostos-box"
    # ssh -G prints the text before it expands tokens: %% is a percent sign.
    assert resolved["identityfile"].replace("%%", "%") == str(identity.control.private)
    assert resolved["userknownhostsfile"].replace("%%", "%").strip('"') == str(identity.known_hosts)
    assert resolved["stricthostkeychecking"] == "true"


@pytest.mark.skipif(not shutil.which("ssh"), reason="ssh is not installed")
def test_words_arrive_as_they_are() -> None:
    instance = Instance.named("box")
    assert ssh_command(instance, split([]))[-1] == "hostos-box"
    assert ssh_command(instance, split(["a && b"]))[-2:] == ["--", "a && b"]
    assert ssh_command(instance, split(["echo", "a b", "$HOME"]))[-1] == "echo 'a b' '$HOME'"
