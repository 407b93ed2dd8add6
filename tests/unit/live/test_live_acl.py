"""ACLs as the kernel has them, as a layer lists them, and as archives spell them."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.image import acls
from hostos.image.entries import Entry
from hostos.live import acl
from hostos.live.acl import GROUP, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, Acls
from hostos.live.upper import acl as inside

BITS = st.integers(0, 7)
IDS = st.integers(0, 0xFFFFFFFE)
NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & set(b"/\0") and name.strip(b"."))
PATHS = st.lists(NAMES, max_size=4).map(b"/".join)


@st.composite
def lists(draw: st.DrawFn) -> acl.Acl:
    named = [(USER, bits, id) for id, bits in draw(st.dictionaries(IDS, BITS, max_size=3)).items()]
    named += [(GROUP, bits, id) for id, bits in draw(st.dictionaries(IDS, BITS, max_size=3)).items()]
    mask = [(MASK, draw(BITS), 0)] if named or draw(st.booleans()) else []
    return acl.checked([(USER_OBJ, draw(BITS), 0), (GROUP_OBJ, draw(BITS), 0), *named, *mask, (OTHER, draw(BITS), 0)])


EXTENDED = lists().filter(lambda found: not acl.is_minimal(found))


@given(st.dictionaries(PATHS, st.tuples(st.integers(0, 0o7777), EXTENDED | st.just(()), lists() | st.just(()))))
def test_a_list_is_read_as_it_was_written(given: dict[bytes, tuple[int, acl.Acl, acl.Acl]]) -> None:
    text = acl.render((path, mode, Acls(access, default)) for path, (mode, access, default) in given.items())
    assert acl.parse(text) == {path: Acls(access, default) for path, (_, access, default) in given.items()}


@given(lists())
def test_an_attribute_is_read_as_it_was_written(found: acl.Acl) -> None:
    assert acl.decode(acl.encode(found)) == found
    assert 0 <= acl.mode_bits(found) <= 0o777


@given(st.binary(max_size=200))
def test_noise_is_refused_politely(data: bytes) -> None:
    for read in (acl.decode, acl.parse):
        try:
            read(data)
        except ValueError:
            continue


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's groups don't let all modes be set")
@pytest.mark.skipif(not shutil.which("getfacl"), reason="needs getfacl (acl)")
@given(EXTENDED)
def test_the_kernel_takes_what_is_taken_here(found: acl.Acl) -> None:
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        os.setxattr(path, "system.posix_acl_access", acl.encode(found))
        assert os.getxattr(path, "system.posix_acl_access") == acl.encode(found)
        assert path.stat().st_mode & 0o777 == acl.mode_bits(found)
        shown = subprocess.run(["getfacl", "-nE", "-c", path], capture_output=True, check=True).stdout.split(b"\n\n")[0]
        assert acl.render([(b"x", 0, Acls(found))]).strip().split(b"\n", 1)[1] == shown.strip()


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [(USER_OBJ, 7, 0), (GROUP_OBJ, 5, 0)],
        [(USER_OBJ, 8, 0), (GROUP_OBJ, 5, 0), (OTHER, 0, 0)],
        [(USER_OBJ, 7, 0), (USER, 7, 1), (GROUP_OBJ, 5, 0), (OTHER, 0, 0)],
        [(USER_OBJ, 7, 0), (USER, 7, 1), (USER, 5, 1), (GROUP_OBJ, 5, 0), (MASK, 7, 0), (OTHER, 0, 0)],
        [(USER_OBJ, 7, 0), (USER, 7, 0xFFFFFFFF), (GROUP_OBJ, 5, 0), (MASK, 7, 0), (OTHER, 0, 0)],
        [(USER_OBJ, 7, 0), (3, 7, 0), (GROUP_OBJ, 5, 0), (OTHER, 0, 0)],
    ],
)
def test_what_is_no_acl(entries: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="ACL"):
        acl.decode(struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user::rw-,user:lisa:r-x,group::r--,mask::r-x,other::---", (USER, 5, 502)),
        ("user::rw-\nuser:nobody-here:r--:77\ngroup::r--\nmask::r--\nother::---\n", (USER, 4, 77)),
        ("u::rw-,g::r--,g:staff:rwx:50,m:rwx,o:---", (GROUP, 7, 50)),
        ("user::rw-,user:9:rwx\t#effective:r--,group::r--,mask::r--,other::r--", (USER, 7, 9)),
    ],
)
def test_archives_spell_them_in_many_ways(text: str, expected: tuple[int, int, int]) -> None:
    passwd = b"root:x:0:0::/:/bin/sh\nlisa:x:502:100::/:/bin/sh\n"
    entries = [
        Entry(b"etc/passwd", 0o100644, size=len(passwd), segments=((0, len(passwd)),), open=lambda: io.BytesIO(passwd)),
        Entry(b"file", 0o100600, xattrs=((b"SCHILY.acl.access", text.encode()),)),
    ]
    (file,) = (entry for entry in acls.from_archive(entries, "t.tar") if entry.path == b"file")
    ((name, value),) = file.xattrs
    assert name == acl.ACCESS
    assert expected in acl.decode(value)
    assert file.mode & 0o777 == acl.mode_bits(acl.decode(value))


@pytest.mark.parametrize(
    "text",
    [
        "user::rw-,user:bart:r-x,group::r--,mask::r-x,other::---",
        "nonsense",
        "user::rw-",
        "user::rwy,group::---,other::---",
    ],
)
def test_archives_that_say_nonsense(text: str) -> None:
    with pytest.raises(UserError, match=r"t\.tar: /file: ") as told:
        acls.from_archive([Entry(b"file", 0o100600, xattrs=((b"SCHILY.acl.access", text.encode()),))], "t.tar")
    assert told.value.status == 2


def test_a_container_sees_its_own_users() -> None:
    found = acl.checked(
        [(USER_OBJ, 7, 0), (USER, 7, 524288 + 33), (USER, 1, 12), (GROUP_OBJ, 5, 0), (MASK, 7, 0), (OTHER, 0, 0)]
    )
    seen = acl.decode(inside(acl.encode(found), 524288))
    assert {id for tag, _, id in seen if tag == USER} == {33, 65534}
    assert inside(acl.encode(found), 0) == acl.encode(found)
