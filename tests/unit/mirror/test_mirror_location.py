"""Request targets: what is asked for, and what no package manager asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.mirror.errors import RefusedError
from hostos.mirror.location import parse_target, to_url


@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("http://deb.example.org/debian/dists/x/InRelease", "deb.example.org/debian/dists/x/InRelease"),
        ("http://DEB.example.org:80/debian//pool/./a_1%2b1.deb", "deb.example.org/debian/pool/a_1+1.deb"),
        ("https://h:443/x", "h/x"),
        ("https://h:80/x", "h:80/x"),
        ("http://user:secret@h/x", "h/x"),
        ("http://[2001:db8::1]:3142/x", "[2001:db8::1]:3142/x"),
        ("/deb.example.org/debian/x", "deb.example.org/debian/x"),
        ("/pacman/core/x86_64/core.db", "pacman/core/x86_64/core.db"),
        ("http://h/a%7eb", "h/a~b"),
    ],
)
def test_good_ones(target, location):
    assert parse_target(target) == location


@pytest.mark.parametrize(
    "target",
    [
        *("", "*", "x", "http://", "http:///x", "ftp://h/x", "http://h/a?b", "http://h/a#b", "http://h/../x"),
        *(
            "http://h/a/%2e%2e/b",
            "http://h/%00",
            "http://h/%5c",
            "http://h/a%20b",
            "http://h/%ff",
            "/a b",
            "/" + "a" * 5000,
        ),
        *("http://-h/x", "http://h:123456/x", "/ä/x"),
    ],
)
def test_bad_ones(target):
    with pytest.raises(RefusedError) as caught:
        parse_target(target)
    assert caught.value.status == 400


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60))
def test_nothing_gets_out(path):
    try:
        location = parse_target(f"http://h/{path}")
    except RefusedError:
        return
    parts = location.split("/")
    assert parts[0] == "h"
    assert ".." not in parts
    assert parse_target(to_url("http://h", location.partition("/")[2])) == location
