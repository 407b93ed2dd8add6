"""Reads a verified index into the catalogue. `python -m hostos.mirror.indexes`

A process of its own: a large index takes a second or two of CPU and tens of megabytes, neither of
which the proxy can spare while it serves. Reads as a stream: a Packages file is 50 MB unpacked.

Formats: https://wiki.debian.org/DebianRepository/Format (Packages, Sources, Packages.diff/Index);
alpm-repo-desc (pacman databases).
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import lzma
import re
import resource
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from hostos.mirror.catalogue import Catalogue, FileRow
from hostos.mirror.errors import RefusedError
from hostos.mirror.location import clean_path

MEMORY = 1 << 30
"""Bytes of address space; what needs more is no index."""
BLOCK = 1 << 20
MAX_PARAGRAPH = 16 << 20
COMPRESSIONS = ("xz", "zst", "gz", "lzma", "bz2", "")
"""By preference: the first one that a Release lists is fetched."""

_KINDS = re.compile(r"(?:.*/)?(Packages|Sources)(?:\.(?:xz|zst|gz|lzma|bz2))?")
_SHA256 = re.compile(rb"[0-9a-fA-F]{64}")


def kind_of(path: str) -> str | None:
    """Which kind of index a file is, if it is one that names further files."""
    if path.endswith(".diff/Index"):
        return "diff"
    found = _KINDS.fullmatch(path)
    return found[1].lower() if found else None


class Field:
    """A field of a paragraph. Nearly all archives write its name in the same way, and `find` is ten times as quick
    as a pattern: a suite has 60 000 paragraphs, and a client waits."""

    def __init__(self, name: str) -> None:
        self._plain = f"\n{name}:".encode()
        self._pattern = re.compile(rb"^" + name.encode() + rb":[ \t]*([^\n]*)", re.M | re.I)

    def of(self, text: bytes) -> bytes:
        """Its first line in `text`, which begins with a new line; empty if it has none."""
        at = text.find(self._plain)
        if at >= 0:
            at += len(self._plain)
            end = text.find(b"\n", at)
            return text[at : end if end >= 0 else len(text)].strip()
        found = self._pattern.search(text)
        return found[1].strip() if found else b""


_FILENAME, _SIZE, _DIGEST = Field("Filename"), Field("Size"), Field("SHA256")
_PACKAGE, _ARCHITECTURE, _DIRECTORY = Field("Package"), Field("Architecture"), Field("Directory")
_CHECKSUMS = re.compile(rb"^Checksums-Sha256:[^\n]*\n((?:[ \t][^\n]*\n?)*)", re.M | re.I)
_DOWNLOADS = re.compile(rb"^SHA256-Download:[^\n]*\n((?:[ \t][^\n]*\n?)*)", re.M | re.I)


@contextmanager
def opened(path: Path, compression: str) -> Iterator[BinaryIO]:
    """The unpacked content of `path`."""
    if compression == "zst":
        with subprocess.Popen(["zstd", "-dcq", "--", path], stdout=subprocess.PIPE) as process:
            assert process.stdout
            yield cast(BinaryIO, process.stdout)
        if process.returncode != 0:
            raise OSError(f"zstd ended with status {process.returncode}")
        return
    makers: dict[str, Callable[[Path], object]] = {
        "xz": lzma.open, "lzma": lzma.open, "gz": gzip.open, "bz2": bz2.open, "": lambda name: name.open("rb"),
    }  # fmt: skip
    with cast(BinaryIO, makers[compression](path)) as stream:
        yield stream


def paragraphs(stream: BinaryIO) -> Iterator[bytes]:
    """Each begins with a new line."""
    rest = b""
    while block := stream.read(BLOCK):
        *whole, rest = (rest + block).split(b"\n\n")
        for text in whole:
            yield b"\n" + text
        if len(rest) > MAX_PARAGRAPH:
            raise ValueError("a paragraph without end")
    yield b"\n" + rest


def packages(stream: BinaryIO, base: str) -> Iterator[FileRow]:
    """File names are relative to the archive's URL, `base`."""
    for text in paragraphs(stream):
        row = _row(base, _FILENAME.of(text), _SIZE.of(text), _DIGEST.of(text))
        if row:
            name = _PACKAGE.of(text) + b":" + _ARCHITECTURE.of(text)
            yield FileRow(row.location, row.size, row.sha256, name.decode(errors="replace"))


def sources(stream: BinaryIO, base: str) -> Iterator[FileRow]:
    for text in paragraphs(stream):
        directory = _DIRECTORY.of(text)
        listing = _CHECKSUMS.search(text)
        for line in listing[1].splitlines() if listing else ():
            words = line.split()
            if len(words) == 3 and (row := _row(base, directory + b"/" + words[2], words[1], words[0])):
                yield row


def diff(stream: BinaryIO, base: str) -> Iterator[FileRow]:
    """The patches of a Packages.diff/Index; `base` is the directory of the Index."""
    listing = _DOWNLOADS.search(stream.read(MAX_PARAGRAPH) + b"\n")
    for line in listing[1].splitlines() if listing else ():
        words = line.split()
        if len(words) == 3 and (row := _row(base, words[2], words[1], words[0])):
            yield row
            yield FileRow(f"{base}/by-hash/SHA256/{row.sha256}", row.size, row.sha256, "")


def pacman(path: Path, base: str) -> Iterator[FileRow]:
    """The `desc` entries of a repository database."""
    with opened(path, _tar_compression(path)) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if not member.isfile() or not member.name.endswith("/desc") or member.size > MAX_PARAGRAPH:
                continue
            file = archive.extractfile(member)
            assert file
            lines = file.read().split(b"\n")
            values = {key: lines[number + 1] for number, key in enumerate(lines[:-1]) if key.startswith(b"%")}
            filename = values.get(b"%FILENAME%", b"")
            if b"/" in filename:
                continue
            row = _row(base, filename, values.get(b"%CSIZE%", b""), values.get(b"%SHA256SUM%", b""))
            if row:
                name = values.get(b"%NAME%", b"") + b":" + values.get(b"%ARCH%", b"")
                yield FileRow(row.location, row.size, row.sha256, name.decode(errors="replace"))


def _tar_compression(path: Path) -> str:
    with path.open("rb") as stream:
        magic = stream.read(6)
    for compression, wanted in (
        ("gz", b"\x1f\x8b"),
        ("xz", b"\xfd7zXZ"),
        ("zst", b"\x28\xb5\x2f\xfd"),
        ("bz2", b"BZh"),
    ):
        if magic.startswith(wanted):
            return compression
    return ""


def _row(base: str, name: bytes, size: bytes, digest: bytes) -> FileRow | None:
    """None for an entry that can't be a file of the archive."""
    if not name or not re.fullmatch(rb"[0-9]{1,18}", size) or not _SHA256.fullmatch(digest):
        return None
    try:
        path = clean_path(name)
    except RefusedError:
        return None
    return FileRow(f"{base}/{path}", int(size), digest.decode().lower(), "") if path else None


READ_ERRORS = (OSError, ValueError, EOFError, MemoryError, lzma.LZMAError, tarfile.TarError, zlib.error)
"""For what is no index, or not the one that its name says."""

READERS: dict[str, Callable[[BinaryIO, str], Iterator[FileRow]]] = {
    "packages": packages, "sources": sources, "diff": diff,
}  # fmt: skip


def read(catalogue: Catalogue, path: Path, location: str, base: str, kind: str, sha256: str) -> int:
    """Add the files that the index at `path` names; returns how many.

    `location` is where it came from, `base` what its file names are relative to. Raises one of
    `READ_ERRORS`.
    """
    if kind == "pacman":
        return catalogue.put_files(pacman(path, base), location, sha256)
    suffix = location.rpartition(".")[2]
    with opened(path, suffix if suffix in COMPRESSIONS else "") as stream:
        return catalogue.put_files(READERS[kind](stream, base), location, sha256)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hostos.mirror.indexes")
    for name in ("database", "file"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("location", "base", "kind", "sha256"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with options.file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != options.sha256:
            print("the index has changed since it was verified")
            return 1
    catalogue = Catalogue(options.database)
    try:
        print(read(catalogue, options.file, options.location, options.base, options.kind, options.sha256))
    except READ_ERRORS as error:
        print(f"{options.location}: {error}")
        return 1
    finally:
        catalogue.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
