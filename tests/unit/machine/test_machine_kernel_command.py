from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.machine.kernel_command import COMMAND_LINE_SIZE, compose, encode_key

BASE = "console=ttyS0 quiet"


def decode(line: str) -> list[str]:
    """What the guest makes of it."""
    tokens = [token.partition("=")[2] for token in line.split() if token.startswith("hostos.ssh_key=")]
    return [base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode() for token in tokens]


def test_exact_line() -> None:
    line = compose(BASE, "box", ["ssh-ed25519 AAAA me"], "debug")
    assert line == f"{BASE} hostos.hostname=box debug hostos.ssh_key=c3NoLWVkMjU1MTkgQUFBQSBtZQ"


def test_a_4096_bit_rsa_key_fits_and_the_second_goes_by_the_archive_alone() -> None:
    rsa = "ssh-rsa " + "A" * 716 + " somebody@somewhere.example.org"
    small = "ssh-ed25519 " + "A" * 68 + " me"
    line = compose(BASE, "box", [rsa, rsa.replace("somebody", "other"), small])
    assert decode(line) == [rsa, small]


def test_too_long_without_keys_is_an_error() -> None:
    with pytest.raises(UserError, match="bytes"):
        compose("x" * COMMAND_LINE_SIZE, "box", [])


@given(st.lists(st.text(min_size=1, max_size=900), max_size=6))
def test_never_over_the_limit_and_keys_arrive_unchanged(keys: list[str]) -> None:
    line = compose(BASE, "box", keys)
    assert len(line.encode()) < COMMAND_LINE_SIZE
    decoded = decode(line)
    assert [key for key in keys if key in decoded] == [key for key in decoded if key in keys]
    if keys and len(encode_key(keys[0])) < 1900:
        assert decoded[0] == keys[0]


@given(st.text())
def test_encoded_keys_are_one_plain_token(line: str) -> None:
    assert set(encode_key(line)) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
