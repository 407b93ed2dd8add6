"""Ranges, cluster keys, addresses, Release files, sources.list, the line in the client's configuration."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.mirror import enabling, importing, release, upstreams
from hostos.mirror.answer import parse_range
from hostos.mirror.cluster import Cluster
from hostos.mirror.errors import RefusedError, UnverifiedError
from hostos.mirror.rate import Rate
from hostos.mirror.settings import Settings, parse_address
from hostos.mirror.signatures import Keys, check
from hostos.mirror.upstreams import Apt, Pacman, Upstreams


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", None), ("bytes=0-", (0, 10)), ("bytes=3-4", (3, 5)), ("bytes=-4", (6, 10)), ("bytes=9-99", (9, 10)),
        ("bytes=-99", (0, 10)), ("bytes=1-2,3-4", None), ("bytes=4-3", None), ("bytes=-", None), ("pages=1-2", None),
        ("bytes=x-2", None), ("bytes = 1 - 2", (1, 3)),
    ],
)  # fmt: skip
def test_ranges(text, part):
    assert parse_range(text, 10) == part


@pytest.mark.parametrize("text", ["bytes=10-", "bytes=10-20", "bytes=-0"])
def test_ranges_beyond_the_end(text):
    with pytest.raises(RefusedError) as caught:
        parse_range(text, 10)
    assert caught.value.status == 416


@given(st.text(max_size=30), st.integers(1, 1000))
def test_no_range_leaves_the_file(text, size):
    try:
        part = parse_range(text, size)
    except RefusedError:
        return
    assert part is None or 0 <= part[0] < part[1] <= size


def test_cluster_admits_members_once():
    ours, others, everybody = Cluster(b"k" * 32), Cluster(b"x" * 32), Cluster()
    request = ("GET", "/sha256/" + "a" * 64, "bytes=0-1")
    signed = ours.sign(*request)["Authorization"]
    assert not others.admits(*request, signed)
    assert not ours.admits("GET", request[1], "", signed)
    assert not ours.admits(*request, "")
    assert ours.admits(*request, signed)
    assert not ours.admits(*request, signed)
    assert everybody.admits(*request, "")
    assert everybody.sign(*request) == {}
    assert len({cluster.tag for cluster in (ours, others, everybody)}) == 3
    assert ours.swarm_key("a" * 64) != everybody.swarm_key("a" * 64)
    assert len(ours.swarm_key("a" * 64)) == 20


def test_old_requests_are_not_admitted(monkeypatch):
    ours = Cluster(b"k" * 32)
    signed = ours.sign("GET", "/x", "")["Authorization"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 400)
    assert not ours.admits("GET", "/x", "", signed)


def test_rate():
    async def take() -> float:
        rate = Rate(1_000_000)
        began = time.monotonic()
        for _ in range(10):
            await rate.take(100_000)
        return time.monotonic() - began

    assert asyncio.run(take()) > 0.6


@pytest.mark.parametrize(
    ("text", "address"),
    [("h:1", ("h", 1)), ("h", ("h", 9)), ("[::1]:5", ("::1", 5)), ("[::1]", ("::1", 9)), ("::1", ("::1", 9))],
)
def test_addresses(text, address):
    assert parse_address(text, "--peer", 9) == address


@pytest.mark.parametrize("text", ["", ":", "h:0", "h:99999", "h:x", "x:y:z", "a b", "h/x:1"])
def test_no_addresses(text):
    with pytest.raises(UserError):
        parse_address(text, "--peer", 9)


def test_settings_survive():
    settings = Settings(peers=("a:1",), dht=("b:2",), contribute=3)
    assert Settings.from_json(settings.to_json()) == settings


RELEASE = """Date: Sat, 11 Jan 2025 09:14:32 UTC
Valid-Until: Sat, 18 Jan 2025 09:14:32 UTC
Components: main contrib
SHA256:
 {0} 12 main/binary-amd64/Packages
 {0} 12 ../evil
 short 12 x
"""


def test_release():
    found = release.parse(RELEASE.format("a" * 64).encode(), "x")
    assert found.date == 1736586872
    assert found.components == ("main", "contrib")
    assert [item.path for item in found.files] == ["main/binary-amd64/Packages"]
    release.check_time(found, "x", now=found.date + 86400)
    for now in (found.date - 3600, found.date + 8 * 86400):
        with pytest.raises(UnverifiedError):
            release.check_time(found, "x", now=now)
    release.check_time(found, "x", now=0, check_date=False)
    release.check_time(found, "x", now=2e9, check_valid_until=False)


@pytest.mark.parametrize("text", [b"", b"Date: never\n", b"Suite: x\n", b"\xff\xfe"])
def test_no_release(text):
    with pytest.raises(UnverifiedError):
        release.parse(text, "x")


def test_gpgv_status():
    good = [["GOODSIG", "K", "n"], ["VALIDSIG", "FPR", "d", "t", "0", "4", "0", "22", "10", "00", "PRIMARY"]]
    check(good, (), "x")
    check([["NO_PUBKEY", "B"], *good], (), "x")
    check(good, ("PRIMARY",), "x")
    check(good, ("FPR!",), "x")
    weak = [good[0], [*good[1][:8], "2", "00", "PRIMARY"]]
    for status, prints in (
        ([], ()),
        ([*good, ["BADSIG", "K"]], ()),
        (good, ("OTHER",)),
        (weak, ()),
        ([["EXPKEYSIG", "K", "n"], good[1]], ()),
        ([["REVKEYSIG", "K", "n"], good[1]], ()),
        ([["EXPSIG", "K", "n"], good[1]], ()),
        ([["NO_PUBKEY", "B"]], ()),
    ):
        with pytest.raises(UnverifiedError):
            check(status, prints, "x")


def test_signed_by():
    assert Keys.parse("/a.gpg, /b.asc") == Keys(("/a.gpg", "/b.asc"))
    assert Keys.parse("a" * 40 + "!").fingerprints == ("A" * 40 + "!",)
    assert Keys.parse("\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n").armored.splitlines()[1] == ""
    with pytest.raises(UserError):
        Keys.parse("nonsense")


def test_import_of_sources(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# a comment\n"
        "deb http://deb.example.org/debian/ bookworm main contrib # why\n"
        "deb-src [arch=amd64,arm64 signed-by=/k.gpg check-valid-until=no] https://h/x suite main\n"
        "deb [trusted=yes] http://unsigned/x ./\n"
        "deb cdrom:[Debian]/ bookworm main\n"
        "deb http://flat/x ./\n"
    )
    (tmp_path / "sources.list.d/a.sources").write_text(
        "Types: deb deb-src\nURIs: http://a/x http://b/x\n# in between\nSuites: s t\nComponents: main\nSigned-By:\n"
        " -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abcd\n -----END PGP PUBLIC KEY BLOCK-----\n\n"
        "Types: deb\nURIs: http://c/x\nSuites: s\nComponents: main\nEnabled: no\n"
    )
    notes: list[str] = []
    found = list(importing.apt_entries(tmp_path, notes))
    assert [(each.url, each.suites, each.sources) for each in found] == [
        ("http://deb.example.org/debian", ("bookworm",), False),
        ("https://h/x", ("suite",), True),
        ("http://flat/x", ("./",), False),
        ("http://a/x", ("s", "t"), True),
        ("http://b/x", ("s", "t"), True),
    ]
    assert found[1].architectures == ("amd64", "arm64")
    assert not found[1].check_valid_until
    assert found[2].roots() == [""]
    assert found[3].keys.armored.startswith("-----BEGIN")
    assert len(notes) == 2


def test_the_file_of_archives(tmp_path):
    file = tmp_path / "config/mirror.toml"
    assert upstreams.load(file) is None
    made = Upstreams(
        (Apt("http://a/x", ("s",), ("main",), (), "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nabc\n"),),
        (Pacman("core", "x86_64", ("https://m/core/os/x86_64",)),),
    )
    upstreams.save(made, file)
    assert upstreams.load(file) == made
    assert made.merged(made) == made
    assert len(made.merged(Upstreams((Apt("http://b/x", ("s",)),))).apt) == 2
    for text in ("x", "[[apt]]\nurl='ftp://x'\nsuites=['s']", "[[apt]]\nurl='http://x'\nsuites=[]", "[[apt]]\nnone=1"):
        file.write_text(text)
        with pytest.raises(UserError):
            upstreams.load(file)


def test_which_archive():
    inner, outer = Apt("http://h/a/b", ("s",)), Apt("http://h/a", ("s",))
    both = Upstreams((outer, inner))
    assert both.find_apt("h/a/b/x") == [inner]
    assert both.find_apt("h/a/c") == [outer]
    assert both.find_apt("h/ab") == []
    assert both.find_apt("other/a/c") == []


def test_enable_and_disable_apt(tmp_path):
    with pytest.raises(UserError, match="there is no apt here"):
        enabling.enable("apt", "http://x", tmp_path)
    (tmp_path / "etc/apt/apt.conf.d").mkdir(parents=True)
    path, changed = enabling.enable("apt", "http://127.0.0.1:3143", tmp_path)
    assert changed
    assert path.read_text().count("\n") == 1
    assert path.stat().st_mode & 0o777 == 0o644
    assert enabling.enable("apt", "http://127.0.0.1:3143", tmp_path) == (path, False)
    path.write_text("// mine\n" + path.read_text())
    with pytest.raises(UserError, match="has been edited"):
        enabling.disable("apt", tmp_path)
    path.write_text(path.read_text().removeprefix("// mine\n"))
    assert enabling.disable("apt", tmp_path) == (path, True)
    assert not path.exists()
    assert enabling.disable("apt", tmp_path) == (path, False)


@pytest.mark.parametrize(
    "before", [b"", b"Server = https://m/$repo/os/$arch\n", b"# no new line at the end\nServer = x"]
)
def test_enable_and_disable_pacman(tmp_path, before):
    path = tmp_path / "etc/pacman.d/mirrorlist"
    path.parent.mkdir(parents=True)
    path.write_bytes(before)
    assert enabling.enable("pacman", "http://127.0.0.1:3143", tmp_path) == (path, True)
    assert path.read_bytes() == b"Server = http://127.0.0.1:3143/pacman/$repo/$arch\n" + before
    assert enabling.enable("pacman", "http://127.0.0.1:3143", tmp_path) == (path, False)
    assert enabling.disable("pacman", tmp_path) == (path, True)
    assert path.read_bytes() == before
    assert enabling.disable("pacman", tmp_path) == (path, False)
