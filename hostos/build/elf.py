"""Leaving out the shared libraries that nothing in a tree needs."""

from __future__ import annotations

import io
import json
import posixpath
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from hostos.build.tree import Tree

_DLOPEN_NOTE = 0x407C0C0A  # https://systemd.io/ELF_DLOPEN_METADATA/


@dataclass(frozen=True)
class Needs:
    """What an ELF file asks of the dynamic linker; `search` are its own directories (RUNPATH)."""

    libraries: tuple[str, ...]
    search: tuple[str, ...] = ()
    required_dlopen: tuple[str, ...] = ()


def needs(data: bytes) -> Needs | None:
    """The needs of an ELF file, None if `data` is none."""
    if not data.startswith(b"\x7fELF"):
        return None
    try:
        elf = ELFFile(io.BytesIO(data))
        libraries: list[str] = []
        search: list[str] = []
        dlopen: list[str] = []
        for segment in elf.iter_segments():
            if segment["p_type"] == "PT_DYNAMIC":
                for tag in segment.iter_tags():
                    if tag.entry.d_tag == "DT_NEEDED":
                        libraries.append(tag.needed)
                    elif tag.entry.d_tag in ("DT_RUNPATH", "DT_RPATH"):
                        value = tag.runpath if tag.entry.d_tag == "DT_RUNPATH" else tag.rpath
                        search.extend(value.split(":"))
            elif segment["p_type"] == "PT_INTERP":
                libraries.append(posixpath.basename(segment.get_interp_name()))
            elif segment["p_type"] == "PT_NOTE":
                for note in segment.iter_notes():
                    if note["n_name"] == "FDO" and note["n_type"] == _DLOPEN_NOTE:
                        dlopen.extend(_required(note["n_descdata"]))
    except (ELFError, UnicodeDecodeError, ValueError, KeyError):
        return None
    return Needs(tuple(libraries), tuple(search), tuple(dlopen))


def _required(description: bytes) -> Iterable[str]:
    for entry in json.loads(description.rstrip(b"\0")):
        if entry.get("priority") == "required":
            yield from entry["soname"]


def unneeded_libraries(tree: Tree, kept: Iterable[str]) -> set[str]:
    """Paths of shared libraries (and the symbolic links to them) that no program or Python
    extension in `tree` reaches, directly or through other libraries.

    Only files directly in a library directory count as libraries; what lies deeper (plug-ins,
    Python extensions) is taken as used. `kept`: names (SONAMEs) that stay in any case.
    """
    libraries: dict[str, str] = {}
    roots: list[str] = []
    for path, entry in tree.entries.items():
        if ".so" not in posixpath.basename(path) or not _in_library_directory(path):
            if stat.S_ISREG(entry.mode):
                roots.append(path)
            continue
        libraries[posixpath.basename(path)] = path
    used: set[str] = set()
    todo = [libraries[name] for name in kept if name in libraries]
    todo += roots
    seen: set[str] = set()
    while todo:
        path = tree.resolve(todo.pop())
        if path in seen or path not in tree:
            continue
        seen.add(path)
        found = needs(tree.entries[path].data)
        if found is None:
            continue
        for name in (*found.libraries, *found.required_dlopen):
            if name in libraries:
                used |= _chain(tree, libraries[name])
                todo.append(libraries[name])
    for name in kept:
        if name in libraries:
            used |= _chain(tree, libraries[name])
    return set(libraries.values()) - used


def _in_library_directory(path: str) -> bool:
    parent = posixpath.dirname(path)
    # usr/lib/systemd holds libsystemd-shared and libsystemd-core, found by RUNPATH.
    return parent in ("usr/lib", "usr/lib64") or (
        parent.startswith("usr/lib/") and parent.endswith(("-linux-gnu", "-linux-gnu/systemd"))
    )


def _chain(tree: Tree, path: str) -> set[str]:
    """A library with the symbolic links that lead to it."""
    chain = {path}
    while (entry := tree.entries.get(path)) is not None and stat.S_ISLNK(entry.mode):
        target = entry.data.decode()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        chain.add(path)
    return chain
