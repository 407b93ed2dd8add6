"""Public keys as people hand them over."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.machine.keys import MAX_FILE, PublicKey, parse_public_keys, read_public_keys

SOURCE = Path("/keys/me.pub")
ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJwTUwWq+WG3lLW6m6oX2fsfs5bW5sZEUl2yVCMw3Gp+"


def parse(text: str) -> tuple[PublicKey, ...]:
    return parse_public_keys(text.encode(), source=SOURCE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One key of each kind, from ssh-keygen itself."""
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed")
    place = tmp_path_factory.mktemp("keys")
    keys = {}
    for name, options in {
        "ed25519": ["-t", "ed25519"],
        "rsa4096": ["-t", "rsa", "-b", "4096"],
        "ecdsa": ["-t", "ecdsa", "-b", "384"],
    }.items():
        keys[name] = place / name
        subprocess.run(
            ["ssh-keygen", "-q", *options, "-N", "", "-C", 'Ann "the key" O\'Hara # 1', "-f", keys[name]], check=True
        )
    return keys


@pytest.mark.parametrize("kind", ["ed25519", "rsa4096", "ecdsa"])
def test_what_ssh_keygen_writes_is_taken_as_it_is(made: dict[str, Path], kind: str) -> None:
    path = made[kind].with_suffix(".pub")
    (key,) = read_public_keys(path)
    assert key.line == path.read_text().strip()
    assert key.comment == 'Ann "the key" O\'Hara # 1'


def test_other_formats_of_ssh_keygen(made: dict[str, Path], tmp_path: Path) -> None:
    public = made["rsa4096"].with_suffix(".pub")
    (key,) = read_public_keys(public)
    for form in ("RFC4716", "PKCS8"):
        text = subprocess.run(
            ["ssh-keygen", "-e", "-m", form, "-f", public], check=True, capture_output=True, text=True
        ).stdout
        if form == "RFC4716":
            (converted,) = parse(text)
            assert (converted.type, converted.blob) == (key.type, key.blob)
        else:
            with pytest.raises(UserError, match="PEM") as caught:
                parse(text)
            assert "ssh-keygen -i" in caught.value.hint


@pytest.mark.parametrize("kind", ["ed25519", "rsa4096", "ecdsa"])
def test_a_private_key_is_named_as_such_and_never_shown(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a private key") as caught:
        read_public_keys(made[kind])
    assert caught.value.hint == f"give its public half: --key {made[kind]}.pub"
    alone = tmp_path / "alone"
    shutil.copy(made[kind], alone)
    with pytest.raises(UserError) as caught:
        read_public_keys(alone)
    assert f"ssh-keygen -y -f {alone}" in caught.value.hint
    secret = made[kind].read_text().splitlines()[2]
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"{ED25519} me\r\n",
        f"\ufeff{ED25519} me\n",
        f"\n# a comment\n\n  {ED25519}   me\n",
        f"{ED25519} me\r",
        f"{ED25519.replace(' ', chr(9))} me",
        f"{ED25519} me\n{ED25519} me\n",
    ],
)
def test_harmless_variations(text: str) -> None:
    assert [key.line for key in parse(text)] == [f"{ED25519} me"]


def test_utf16_from_windows() -> None:
    assert parse_public_keys(f"{ED25519} me\r\n".encode("utf-16"), source=SOURCE)[0].line == f"{ED25519} me"


def test_several_keys_keep_their_order(made: dict[str, Path]) -> None:
    text = made["ecdsa"].with_suffix(".pub").read_text() + ED25519 + " second\n"
    assert [key.type for key in parse(text)] == ["ecdsa-sha2-nistp384", "ssh-ed25519"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no key"),
        ("# only a comment\n", "holds no key"),
        ("hello world\n", "not an SSH public key"),
        (f'command="reboot" {ED25519} x', "options before the key"),
        (f'no-pty,from="10.0.0.0/8" {ED25519}', "options before the key"),
        (ED25519[:-8], "damaged or cut off"),
        ("ssh-ed25519", "damaged or cut off"),
        ("ssh-ed25519 !!!!", "damaged or cut off"),
        ("ssh-rsa " + ED25519.split()[1], "damaged or cut off"),
        ("ssh-dss AAAAB3NzaC1kc3MAAACBAP== x", "DSA"),
        ("ssh-ed25519-cert-v01@openssh.com AAAA x", "certificate"),
        (f"{ED25519} good\nrubbish\n", "line 2"),
        ("PuTTY-User-Key-File-3: ssh-ed25519\n", "private key"),
    ],
)
def test_what_is_refused_and_why(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        parse(text)
    assert caught.value.hint
    assert caught.value.status == 2


def test_short_rsa_keys_are_refused_as_sshd_would() -> None:
    def string(data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    blob = string(b"ssh-rsa") + string(b"\1\0\1") + string(b"\0" + b"\xff" * 64)
    with pytest.raises(UserError, match="512 bits"):
        parse("ssh-rsa " + base64.b64encode(blob).decode())


def test_missing_files_say_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "other.pub").write_text(ED25519)
    with pytest.raises(UserError, match="does not exist") as caught:
        read_public_keys(tmp_path / "absent.pub")
    assert "other.pub" in caught.value.hint
    with pytest.raises(UserError) as caught:
        read_public_keys(tmp_path / "other")
    assert caught.value.hint == f"did you mean --key {tmp_path / 'other.pub'}?"
    with pytest.raises(UserError, match="is a directory"):
        read_public_keys(tmp_path)
    (tmp_path / "big.pub").write_bytes(b"x" * (MAX_FILE + 1))
    with pytest.raises(UserError, match="not a public key"):
        read_public_keys(tmp_path / "big.pub")


@given(
    st.binary(max_size=400) | st.text(max_size=200).map(str.encode) | st.text().map(lambda t: f"{ED25519} {t}".encode())
)
def test_any_bytes_give_clean_lines_or_a_user_error(data: bytes) -> None:
    try:
        keys = parse_public_keys(data, source=SOURCE)
    except UserError:
        return
    for key in keys:
        assert "\n" not in key.line
        assert len(key.line.splitlines()) == 1
        assert key.line.isprintable() or not key.comment.isprintable()
        assert parse_public_keys(key.line.encode(), source=SOURCE)[0].blob == key.blob


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=60).map(str.strip))
def test_comments_survive(comment: str) -> None:
    (key,) = parse(f"{ED25519} {comment}\n")
    assert key.comment == comment.strip()
