"""Which machine a tree's programs are for: read from the header of one of them (elf(5))."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable

# e_machine -> name as uname(1) prints it
_MACHINES = {
    3: "i686",
    21: "ppc64le",
    22: "s390x",
    40: "armv7l",
    62: "x86_64",
    183: "aarch64",
    243: "riscv64",
    258: "loongarch64",
}
ARCHITECTURES = tuple(sorted(_MACHINES.values()))

HEADER = 20
"""How many bytes of a program `elf_machine` needs."""

# Where a tree's own programs are, best first; symbolic links don't matter, so both spellings.
_LIKELY = (
    re.compile(rb"(usr/)?bin/(busybox|dash|bash|sh|env|coreutils|true|ls)"),
    re.compile(rb"(usr/)?lib/systemd/systemd"),
    re.compile(rb"(usr/)?s?bin/[^/]+"),
    re.compile(rb"(.*/)?lib(64)?/([^/]+/)?(ld-|libc[.-])[^/]*"),
)


def likely_programs(paths: Iterable[bytes]) -> list[bytes]:
    """`paths` of regular files in the order in which it pays to look at them."""

    def rank(path: bytes) -> int:
        return next((n for n, pattern in enumerate(_LIKELY) if pattern.fullmatch(path)), len(_LIKELY))

    return sorted(paths, key=lambda path: (rank(path), path))


def elf_machine(header: bytes) -> str | None:
    """The architecture of an ELF file's first `HEADER` bytes; None if it is no (known) ELF file."""
    if len(header) < HEADER or header[:4] != b"\x7fELF" or header[5] not in (1, 2):
        return None
    kind, machine = struct.unpack_from("<HH" if header[5] == 1 else ">HH", header, 16)
    # Executables and shared objects only: firmware and object files may be for anything.
    return _MACHINES.get(machine) if kind in (2, 3) else None
