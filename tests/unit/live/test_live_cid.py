"""CIDs: those that can be verified are read in every spelling, all others are refused."""

from __future__ import annotations

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ipfs import base32, binary, number

from hostos.errors import UserError
from hostos.live import cid

HELLO = "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"  # "hello world"
EMPTY_DIRECTORY = (
    "QmUNLLsPACCz1vLxQVkXqqLX5R1X345qqfHbsf67hvA3Nn",
    "bafybeiczsscdsbs7ffqz55asqdf3smv6klcw3gofszvwlyarci47bgf354",
)


def test_known_cids() -> None:
    hello = cid.parse(HELLO)
    assert (hello.codec, str(hello)) == (cid.RAW, HELLO)
    assert hello.matches(b"hello world")
    assert not hello.matches(b"hello worle")
    old, new = map(cid.parse, EMPTY_DIRECTORY)
    assert old == new
    assert str(old) == EMPTY_DIRECTORY[1]
    assert new.matches(b"\x0a\x02\x08\x01")


@pytest.mark.parametrize("before", ["ipfs://", "/ipfs/", " "])
def test_spellings_people_paste(before: str) -> None:
    assert str(cid.parse(before + HELLO)) == HELLO
    assert cid.looks_like_cid(before + HELLO)


@given(st.binary(min_size=32, max_size=32), st.sampled_from([cid.RAW, cid.DAG_PB]))
def test_every_alphabet(digest: bytes, codec: int) -> None:
    wanted = cid.Cid(codec, cid.SHA2_256, digest)
    data = binary(codec, digest)
    assert wanted.to_bytes() == data
    assert cid.from_bytes(data) == wanted
    value = int.from_bytes(data, "big")
    for text in (
        base32(data),
        "B" + base32(data)[1:].upper(),
        "f" + data.hex(),
        "F" + data.hex().upper(),
        "z" + digits(value, "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"),
        "k" + digits(value, "0123456789abcdefghijklmnopqrstuvwxyz"),
    ):
        assert cid.parse(text) == wanted
        assert cid.looks_like_cid(text)


def digits(value: int, alphabet: str) -> str:
    text = ""
    while value:
        value, digit = divmod(value, len(alphabet))
        text = alphabet[digit] + text
    return text


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (binary(0x70, hashlib.sha1(b"x").digest(), 0x11), "SHA-1"),
        (binary(0x70, b"\0" * 31), "shortened"),
        (binary(0x70, b"\0" * 64, 0x13), "SHA-512"),
        (binary(0x55, b"x" * 129, 0), "129 bytes itself"),
        (binary(0x71, b"\0" * 32), "dag-cbor"),
        (binary(0x72, b"\0" * 32), "IPNS"),
        (b"\x01\x70\x12\x20" + b"\0" * 31, "wrong length"),
        (b"\x01\x70\x12\x20" + b"\0" * 33, "wrong length"),
        (b"\x02\x70\x12\x20" + b"\0" * 32, "version 2"),
        (b"\x01\x70\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", "too long"),
    ],
)
def test_what_cannot_be_verified_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        cid.from_bytes(data)
    with pytest.raises(UserError, match=why):
        cid.parse(base32(data))


@pytest.mark.parametrize(
    "text", ["", "b", "Qm", HELLO[:-1], HELLO + "a", HELLO + "/etc", "web/debian", "ab" * 32, "z0OIl"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        cid.parse(text)


@pytest.mark.parametrize(
    "text",
    ["ab" * 32, "ba" * 20, "z" * 64, "f" * 64, "web/debian", "b", "debian-13", "magnet:?xt=urn:btmh:1220" + "ab" * 32],
)
def test_hashes_and_names_are_not_taken_for_cids(text: str) -> None:
    assert not cid.looks_like_cid(text)


@given(st.text(max_size=120))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = cid.parse(text)
    except UserError:
        return
    assert cid.parse(str(found)) == found


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        found = cid.from_bytes(data)
    except ValueError:
        return
    assert found.hash == cid.SHA2_256 or len(found.digest) <= cid.MAX_IDENTITY


@given(st.integers(0, (1 << 64) - 1))
def test_numbers(value: int) -> None:
    assert cid.varint(value) == number(value)
    assert cid.read_varint(number(value), 0) == (value, len(number(value)))


def test_bytes_in_the_cid_itself() -> None:
    found = cid.from_bytes(binary(0x55, b"small", 0))
    assert found.inline == b"small"
    assert found.matches(b"small")
    assert not found.matches(b"other")
    assert base64.b32encode(found.to_bytes())
