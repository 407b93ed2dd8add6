"""Names: only their owner moves them, and never back; what is asked and shown."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostos.cli import main
from hostos.errors import UserError
from hostos.names import push as pushing
from hostos.names.book import Names, Person
from hostos.names.record import MAX_RECORD, Record
from hostos.names.resolve import resolve
from hostos.names.serve import server
from hostos.names.sources import parse_source

ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def steve(tmp_path: Path) -> Names:
    """Somebody with a key on another host."""
    names = Names(tmp_path / "steve")
    names.make_key()
    return names


@pytest.fixture
def url(steve: Names) -> Iterator[str]:
    with server("127.0.0.1", 0, steve) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def mine(tmp_path: Path) -> Names:
    return Names(tmp_path / "mine")


def known(names: Names, person: Names, *sources: str) -> str:
    key = person.public_key()
    assert key
    names.add(Person("steve", key, sources))
    return key


def test_a_name_is_looked_up_moved_and_remembered(steve: Names, url: str, mine: Names) -> None:
    known(mine, steve, url)
    with pytest.raises(UserError, match="no record of steve/gaming"):
        resolve("steve/gaming", mine)
    assert pushing.push(ONE, "gaming", ("192.168.1.5:6881",), 90, steve)[0].sequence == 1
    first = resolve("steve/gaming", mine)
    assert first is not None
    assert (first.record.image, first.record.peers, first.warnings) == (ONE, ("192.168.1.5:6881",), [])
    assert f"steve/gaming is {ONE} (number 1 of " in str(first)
    pushing.push(TWO, "gaming", (), 90, steve)
    assert resolve("steve/gaming", mine).record.image == TWO  # type: ignore[union-attr]
    # Yesterday's.
    assert resolve("steve/gaming@1", mine).record.image == ONE  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"number 3 of steve/gaming was never seen here; known: 1, 2"):
        resolve("steve/gaming@3", mine)
    # Images that are called so, and people nobody knows, are no names.
    assert resolve("web/debian", mine) is None
    assert resolve("steve", mine) is None


def test_a_roll_back_is_refused(steve: Names, url: str, mine: Names) -> None:
    key = known(mine, steve, url)
    old = pushing.push(ONE, "gaming", (), 90, steve)[0]
    pushing.push(TWO, "gaming", (), 90, steve)
    resolve("steve/gaming", mine)
    # Whoever serves it goes back to what was good once.
    (steve.root / "records" / key / "gaming").write_bytes(old.to_json() + b"\n")
    found = resolve("steve/gaming", mine)
    assert found is not None
    assert found.record.image == TWO
    assert "a roll-back, refused" in found.warnings[0]
    with pytest.raises(UserError, match="roll-back"):
        mine.accept(old, key, "gaming")
    assert [record.sequence for record in mine.log(key, "gaming")] == [1, 2] or len(mine.log(key, "gaming")) == 1


def test_forged_and_replayed_records(steve: Names, url: str, mine: Names) -> None:
    key = known(mine, steve, url)
    good = pushing.push(ONE, "gaming", (), 90, steve)[0]
    stranger = Ed25519PrivateKey.generate()
    place = steve.root / "records" / key / "gaming"
    forged = (
        replace(good, image=TWO),
        replace(good, sequence=9),
        replace(good, expires=good.expires + 1),
        replace(good, peers=("192.0.2.1:1",)),
        replace(good, image=TWO).sign(stranger),
    )
    for record in forged:
        with pytest.raises(UserError, match="not signed by"):
            mine.accept(record, key, "gaming")
    # The record of another name of the same owner, under this one.
    other = pushing.push(TWO, "other", (), 90, steve)[0]
    with pytest.raises(UserError, match="instead of 'gaming'"):
        mine.accept(other, key, "gaming")
    with pytest.raises(UserError, match="not signed by"):
        mine.accept(replace(other, name="gaming"), key, "gaming")
    # Two of the same number: the owner's key is in two places.
    mine.accept(good, key, "gaming")
    signer = steve.key()
    assert signer
    with pytest.raises(UserError, match="two different records as number 1"):
        mine.accept(replace(good, image=TWO).sign(signer), key, "gaming")
    # A server that lies changes nothing.
    place.write_bytes(b"")
    assert resolve("steve/gaming", mine).record == good  # type: ignore[union-attr]


def test_expiry_is_shown(steve: Names, mine: Names) -> None:
    key = known(mine, steve)
    signer = steve.key()
    assert signer
    now = int(time.time())
    mine.accept(Record(key, "gaming", 1, ONE, now - 100, now - 50).sign(signer), key, "gaming")
    found = resolve("steve/gaming", mine)
    assert found is not None
    assert "expired on" in found.warnings[0]


def test_petnames_do_not_collide(steve: Names, mine: Names, tmp_path: Path) -> None:
    key = known(mine, steve)
    other = Names(tmp_path / "other")
    other.make_key()
    stranger = other.public_key()
    assert stranger
    with pytest.raises(UserError, match=f"steve is {key[:16]}… in your book, not {stranger[:16]}…"):
        mine.add(Person("steve", stranger))
    with pytest.raises(UserError, match="that key is steve in your book already"):
        mine.add(Person("stephen", key))
    with pytest.raises(UserError, match="'me' is you"):
        mine.add(Person("me", stranger))
    for bad in ("Steve", "a/b", "..", "", "x" * 65):
        with pytest.raises(UserError, match="not a usable name"):
            mine.add(Person(bad, stranger))
    mine.add(Person("steve", stranger), replace=True)
    assert mine.book().people["steve"].key == stranger
    # Gone and back: what was pinned is still pinned.
    old = pushing.push(ONE, "gaming", (), 90, other)[0]
    mine.accept(pushing.push(TWO, "gaming", (), 90, other)[0], stranger, "gaming")
    mine.remove("steve")
    assert mine.person("steve") is None
    mine.add(Person("steve", stranger))
    with pytest.raises(UserError, match="roll-back"):
        mine.accept(old, stranger, "gaming")


def test_numbers_go_on_after_a_name_was_removed(steve: Names) -> None:
    pushing.push(ONE, "gaming", (), 90, steve)
    pushing.push(TWO, "gaming", (), 90, steve)
    steve.forget("gaming")
    key = steve.public_key()
    assert key
    assert steve.log(key, "gaming") == []
    # Or everybody who has seen the second would take it for a roll-back.
    assert pushing.push(ONE, "gaming", (), 90, steve)[0].sequence == 3
    with pytest.raises(UserError, match="no name 'other'"):
        steve.forget("other")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"x" * 2000, b'{"kind": "hostos-name", "schema": 1}', b'{"kind": "hostos-name", "schema": 2}',
    ],
)  # fmt: skip
def test_what_is_no_record(data: bytes) -> None:
    with pytest.raises(UserError, match="record"):
        Record.parse(data)


def test_records_are_checked_field_by_field(steve: Names) -> None:
    peers = ("[2001:db8::1]:6881", "a.example:1", "192.168.1.5:6881")
    record = pushing.push(ONE, "gaming", peers, 90, steve)[0]
    assert Record.parse(record.to_json()) == record
    assert len(record.to_json()) < MAX_RECORD
    fields = json.loads(record.to_json())
    for wrong in (
        {"image": "xyz"}, {"sequence": -1}, {"sequence": True}, {"peers": ["no port"]}, {"peers": "a:1"}, {"more": 1},
        {"name": "UPPER"}, {"signature": ""}, {"expires": 1.5},
    ):  # fmt: skip
        with pytest.raises(UserError):
            Record.parse(json.dumps({**fields, **wrong}).encode())
    with pytest.raises(UserError, match="at most 4"):
        pushing.push(ONE, "gaming", tuple(f"192.0.2.{n}:1" for n in range(5)), 90, steve)
    with pytest.raises(UserError, match="no key to sign with"):
        pushing.push(ONE, "gaming", (), 90, Names(steve.root / "nobody"))


def test_the_key_is_for_its_owner_only(steve: Names) -> None:
    path = steve.root / "identity"
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_text()
    steve.make_key()
    assert path.read_text() == before
    path.write_text("damaged")
    with pytest.raises(UserError, match="can't be read"):
        steve.key()


def test_sources_are_urls() -> None:
    assert parse_source("http://192.168.1.5:6880/") == "http://192.168.1.5:6880"
    for bad in ("192.168.1.5", "ftp://a", "file:///etc/passwd", "http://", "http://a?b", "http://a:x"):
        with pytest.raises(UserError, match="not where records can be"):
            parse_source(bad)


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steve: Names, url: str
) -> None:
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "home"))

    def run(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["name", *map(str, words)])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    key = steve.public_key()
    assert key
    pushing.push(ONE, "gaming", (), 90, steve)
    assert run("add", "steve", key, "--at", url)[0] == 0
    assert run("create", "own")[1].strip() == Names().public_key()
    assert resolve("steve/gaming") is not None
    listed = run("ls")[1]
    assert f"steve             {key}" in listed
    assert "steve/gaming" in listed
    assert "steve/gaming@1" in run("log", "steve/gaming")[1]
    assert run("export", "own")[0] == 2
    pushing.push(TWO, "own", (), 90)
    record = tmp_path / "record"
    record.write_text(run("export", "own")[1])
    assert run("rm", "steve")[0] == 0
    theirs = tmp_path / "theirs"
    theirs.write_bytes(steve.last(key, "gaming").to_json())  # type: ignore[union-attr]
    status, _, err = run("import", theirs)
    assert (status, "who isn't in your book" in err) == (2, True)
    # One's own, on a new host, with a copy of the key: numbers go on.
    identity = (Names().root / "identity").read_text()
    with monkeypatch.context() as moved:
        moved.setenv("HOSTOS_HOME", str(tmp_path / "new"))
        Names().make_key()
        (Names().root / "identity").write_text(identity)
        assert "me/own" in run("import", record)[2]
        assert pushing.push(ONE, "own", (), 90)[0].sequence == 2
    status, _, err = run("add", "steve", "xyz")
    assert (status, "not a public key" in err) == (2, True)
    assert run("log", "steve/gaming")[0] == 2
    assert json.loads(run("ls", "--json")[1])["key"] == Names().public_key()
