"""One order in which all programs load their shared libraries, so that each comes to lie where it always does.

An emulator translates code by its virtual address (QEMU up to 7.2; from 8.0 on by its place in memory): a libc that
lies elsewhere in every program is translated for every program anew. Without address space randomisation a library's
place follows from what the dynamic linker has mapped before it: first the program's own DT_NEEDED, in their order
(ld.so(8), "breadth-first"). In Debian's programs that is the order in which they were linked. Here the libraries
that most programs need come first.

It changes which library a symbol is looked up in first where two define it. In the programs of the default profile that
are four, which libc and libm share: copysign, frexp, ldexp, modf.
"""

from __future__ import annotations

import io
import stat
import struct
from collections import Counter
from dataclasses import dataclass, replace

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from hostos.build.tree import Tree


@dataclass(frozen=True)
class _Needed:
    """A DT_NEEDED entry of a file: where its value is, in bytes from the beginning, that value (an offset into the
    string table), and the name it stands for."""

    place: int
    value: int
    name: str


def unify(tree: Tree) -> int:
    """Put every program's libraries into one order, in place; the number of programs that it changed."""
    programs = {path: found for path, entry in tree.entries.items() if (found := _program(entry.mode, entry.data))}
    users = Counter(each.name for found in programs.values() for each in found)
    changed = 0
    for path, found in programs.items():
        ordered = sorted(found, key=lambda each: (-users[each.name], each.name))
        if ordered == found:
            continue
        entry, changed = tree.entries[path], changed + 1
        data = bytearray(entry.data)
        for old, new in zip(found, ordered, strict=True):
            struct.pack_into("<Q", data, old.place, new.value)
        tree.entries[path] = replace(entry, data=bytes(data))
    return changed


def _program(mode: int, data: bytes) -> list[_Needed]:
    """The libraries that a 64-bit program asks for, in its order; none if this is no program."""
    if not stat.S_ISREG(mode) or not data.startswith(b"\x7fELF\2\1"):
        return []
    try:
        elf = ELFFile(io.BytesIO(data))
        segments = {segment["p_type"]: segment for segment in elf.iter_segments()}
        # Libraries have no interpreter; libc, which has, needs nothing but that.
        if "PT_INTERP" not in segments or "PT_DYNAMIC" not in segments:
            return []
        dynamic, size = segments["PT_DYNAMIC"], elf.structs.Elf_Dyn.sizeof()
        return [
            _Needed(dynamic["p_offset"] + number * size + 8, tag["d_val"], tag.needed)
            for number, tag in enumerate(dynamic.iter_tags())
            if tag.entry.d_tag == "DT_NEEDED"
        ]
    except (ELFError, UnicodeDecodeError, ValueError, KeyError):
        return []
