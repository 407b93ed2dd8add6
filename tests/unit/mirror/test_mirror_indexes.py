"""Indexes are read as a stream; entries that can't be files of the archive are left out."""

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile

import pytest

from hostos.mirror import indexes
from hostos.mirror.catalogue import Catalogue, FileRow, StoredRelease
from hostos.mirror.release import Listed, Release

A, B = "a" * 64, "b" * 64
PACKAGES = f"""Package: one
Version: 1
Architecture: amd64
Description: a
 Filename: this is text
Filename: pool/o/one_1%3a1.deb
Size: 10
SHA256: {A}

Package: two
Filename: pool/../../etc/passwd
Size: 10
SHA256: {A}
Architecture: all

Package: three
Architecture: all
Filename: ./three.deb
Size: ten
SHA256: {B}

Package: four
Architecture: all
SHA256: {B.upper()}
Size: 4
Filename: ./four.deb
"""
ROWS = [FileRow("h/d/pool/o/one_1%3a1.deb", 10, A, "one:amd64"), FileRow("h/d/four.deb", 4, B, "four:all")]


def test_packages():
    assert list(indexes.packages(io.BytesIO(PACKAGES.encode()), "h/d")) == ROWS


def test_a_paragraph_on_the_edge_of_a_block(monkeypatch):
    for size in range(1, 60, 7):
        monkeypatch.setattr(indexes, "BLOCK", size)
        assert list(indexes.packages(io.BytesIO(PACKAGES.encode()), "h/d")) == ROWS


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress), ("", bytes), (".zst", None)],
)
def test_compressions(tmp_path, suffix, pack):
    file = tmp_path / "index"
    data = PACKAGES.encode()
    packed = pack(data) if pack else subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout
    file.write_bytes(packed)
    catalogue = Catalogue(tmp_path / "db")
    location = f"h/d/dists/s/main/binary-amd64/Packages{suffix}"
    assert indexes.read(catalogue, file, location, "h/d", "packages", A) == 2
    assert catalogue.parsed(location) == A
    known = catalogue.file("h/d/four.deb")
    assert known is not None
    assert (known.size, known.sha256) == (4, B)
    assert [each.location for each in catalogue.newest_of(location, ["one:amd64", "none:all"])] == [ROWS[0].location]
    assert catalogue.name_of(B) == "four:all"
    catalogue.close()


def test_sources():
    text = f"Package: s\nDirectory: pool/s\nFiles:\n d41d 5 s.dsc\nChecksums-Sha256:\n {A} 5 s.dsc\n {B} 6 s.tar.xz\n"
    found = list(indexes.sources(io.BytesIO(text.encode()), "h"))
    assert found == [FileRow("h/pool/s/s.dsc", 5, A, ""), FileRow("h/pool/s/s.tar.xz", 6, B, "")]


def test_patches():
    text = f"SHA256-Current: {A} 9\nSHA256-Download:\n {B} 6 T-1.gz\nSHA256-Patches:\n {A} 7 T-1\n"
    found = [row.location for row in indexes.diff(io.BytesIO(text.encode()), "h/P.diff")]
    assert found == ["h/P.diff/T-1.gz", f"h/P.diff/by-hash/SHA256/{B}"]


@pytest.mark.parametrize("mode", ["gz", "xz", ""])
def test_pacman_database(tmp_path, mode):
    file = tmp_path / "db"
    with tarfile.open(file, f"w:{mode}") as archive:
        for name, filename in (("one", "one-1-any.pkg.tar.zst"), ("evil", "../evil"), ("sub", "a/b")):
            values = {"FILENAME": filename, "NAME": name, "ARCH": "any", "CSIZE": "7", "SHA256SUM": A}
            text = "".join(f"%{key}%\n{value}\n\n" for key, value in values.items()).encode()
            info = tarfile.TarInfo(f"{name}-1/desc")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    assert list(indexes.pacman(file, "pacman/core/x86_64")) == [
        FileRow("pacman/core/x86_64/one-1-any.pkg.tar.zst", 7, A, "one:any")
    ]


def test_which_files_are_indexes():
    kinds = {
        path: indexes.kind_of(path)
        for path in ("d/Packages.xz", "Sources", "P.diff/Index", "x/Contents", "Packages.lz4")
    }
    assert list(kinds.values()) == ["packages", "sources", "diff", None, None]


def put(catalogue: Catalogue, date: float, *files: Listed) -> None:
    stored = StoredRelease("h/dists/s", date, None, date, "", b"x", b"x", b"")
    catalogue.put_release(stored, Release(date, None, (), files))


def test_releases_replace_each_other_but_by_hash_remembers(tmp_path):
    catalogue = Catalogue(tmp_path / "db")
    for date in range(1, 6):
        put(catalogue, float(date), Listed("main/P", date, f"{date}" * 64, f"{date}" * 128))
    now = catalogue.listed("h/dists/s", "main/P")
    assert now is not None
    assert now.size == 5
    assert catalogue.listed_below("h/dists/s") == ["main/P"]
    hashes = [str(date) * 64 for date in range(1, 6)]
    sizes = [catalogue.listed("h/dists/s", f"main/by-hash/SHA256/{each}") for each in hashes]
    assert [known.size if known else None for known in sizes] == [None, None, 3, 4, 5]
    strong = catalogue.listed("h/dists/s", "main/by-hash/SHA512/" + "4" * 128)
    assert strong is not None
    assert strong.location == "h/dists/s/main/P"
    assert catalogue.listed("h/dists/s", "other/by-hash/SHA256/" + "4" * 64) is None
    assert catalogue.listed("h/dists/s", "main/by-hash/MD5Sum/" + "4" * 32) is None
    assert catalogue.root_of("h/dists/s/main/P") == "h/dists/s"
    assert catalogue.root_of("h/dists/sid/main/P") is None
    catalogue.close()
