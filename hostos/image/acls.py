"""POSIX ACLs of entries: `system.posix_acl_*` among their attributes; in a layer, a list of them (hostos.live.acl)."""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Iterable
from dataclasses import replace

from hostos.errors import UserError
from hostos.image.entries import Entry, printable
from hostos.live import acl
from hostos.live.acl import ACCESS, DEFAULT, FILE, Acl, Acls

STAR = {b"SCHILY.acl.access": ACCESS, b"SCHILY.acl.default": DEFAULT}
"""How tar archives spell them (star(5), GNU tar --acls, bsdtar), as text."""


def settled(entry: Entry) -> Entry:
    """`entry` with its ACLs in the kernel's form, and its mode as they say. Raises ValueError for what is none."""
    if not any(key in (ACCESS, DEFAULT) for key, _ in entry.xattrs):
        return entry
    given = dict(entry.xattrs)
    if stat.S_ISLNK(entry.mode):
        raise ValueError("a symbolic link with an ACL")
    if DEFAULT in given and not stat.S_ISDIR(entry.mode):
        raise ValueError("a default ACL of what is no directory")
    mode = entry.mode
    for name in (ACCESS, DEFAULT):
        if name in given:
            decoded = acl.decode(given[name])
            given[name] = acl.encode(decoded)
            if name == ACCESS:
                mode = mode & ~0o777 | acl.mode_bits(decoded)
                if acl.is_minimal(decoded):
                    del given[name]
    return replace(entry, mode=mode, xattrs=tuple(sorted(given.items())))


def absorbed(entries: list[Entry], what: str) -> list[Entry]:
    """`entries` (arranged) of a tree with a list of ACLs in its root: each has its own, and the list is gone.

    Raises UserError if the list is not true of the tree.
    """
    found = next((entry for entry in entries if entry.path == FILE), None)
    if found is None:
        return entries
    if not stat.S_ISREG(found.mode):
        return [entry for entry in entries if entry is not found]
    try:
        lists = acl.parse(found.read(acl.MAX_FILE + 1))
        result: dict[bytes, Entry] = {}
        for entry in entries:
            if entry is found:
                continue
            acls = lists.pop(entry.path, None)
            if entry.link is not None and entry.link in result:
                first = result[entry.link]  # one file, whatever it is called
                entry = replace(entry, mode=first.mode, xattrs=first.xattrs)
            elif acls is not None:
                kept = tuple(item for item in entry.xattrs if item[0] not in (ACCESS, DEFAULT))
                entry = settled(replace(entry, xattrs=(*kept, *acls.attributes())))
            result[entry.path] = entry
        if lists:
            raise ValueError(f"{printable(next(iter(lists)))} is not in the tree")
    except ValueError as error:
        raise UserError(f"{what}: {found.name}: {error}", "it is what `getfacl -R -n .` prints in the tree") from None
    return list(result.values())


def listed(entries: list[Entry]) -> list[Entry]:
    """`entries` (arranged) as squashfs can hold them: their ACLs are a list in the root, if there are any."""
    with_acls = [entry for entry in entries if any(key in (ACCESS, DEFAULT) for key, _ in entry.xattrs)]
    if not with_acls:
        return entries
    data = acl.render((entry.path, entry.mode, _acls(entry)) for entry in with_acls)
    plain = [
        replace(entry, xattrs=tuple(item for item in entry.xattrs if item[0] not in (ACCESS, DEFAULT)))
        for entry in entries
    ]
    segments = ((0, len(data)),)
    return [*plain, Entry(FILE, stat.S_IFREG | 0o400, size=len(data), segments=segments, open=lambda: io.BytesIO(data))]


def _acls(entry: Entry) -> Acls:
    given = dict(entry.xattrs)
    access, default = (acl.decode(given[name]) if name in given else () for name in (ACCESS, DEFAULT))
    return Acls(access, default)


# --- tar archives -----------------------------------------------------------------------------------


def from_archive(entries: Iterable[Entry], what: str) -> list[Entry]:
    """`entries` with the ACLs an archive spells as text in the kernel's form, names of users as the archive's own
    passwd(5) and group(5) have them. Raises UserError for ACLs that can't be read, and for unknown names."""
    found = list(entries)
    users: Callable[[str], int | None] | None = None
    groups: Callable[[str], int | None] | None = None
    for number, entry in enumerate(found):
        if not any(key in STAR or key in (ACCESS, DEFAULT) for key, _ in entry.xattrs):
            continue
        if users is None or groups is None:
            users, groups = (_numbers(found, name) for name in (b"etc/passwd", b"etc/group"))
        try:
            given = dict(entry.xattrs)
            for spelled, name in STAR.items():
                if spelled in given:
                    text = given.pop(spelled).decode(errors="surrogateescape")
                    # GNU tar writes names into the text, and the attribute itself besides.
                    if name not in given:
                        given[name] = acl.encode(from_text(text, users, groups))
            found[number] = settled(replace(entry, xattrs=tuple(sorted(given.items()))))
        except ValueError as error:
            hint = "make the archive with tar --xattrs --xattrs-include='*', which keeps numbers"
            raise UserError(f"{what}: {entry.name}: {error}", hint) from None
    return found


def from_text(text: str, users: Callable[[str], int | None], groups: Callable[[str], int | None]) -> Acl:
    """`user::rwx,user:lisa:r-x:502,…` or one entry per line. Raises ValueError."""
    entries = []
    for word in text.replace("\n", ",").split(","):
        word = word.partition("#")[0].strip()
        if not word:
            continue
        kind, *rest = word.split(":")
        tags = {"user": (acl.USER_OBJ, acl.USER), "group": (acl.GROUP_OBJ, acl.GROUP)}
        tags |= {"mask": (acl.MASK, acl.MASK), "other": (acl.OTHER, acl.OTHER)}
        kind = {"u": "user", "g": "group", "m": "mask", "o": "other"}.get(kind, kind)
        if kind not in tags or not rest:
            raise ValueError(f"{word[:60]!r} is no entry of an ACL")
        if kind in ("mask", "other") and len(rest) == 1:
            rest = ["", *rest]  # star writes mask:rwx
        name, letters, *number = rest if len(rest) > 1 else (*rest, "")
        if len(letters) != 3 or any(letter not in (each, "-") for letter, each in zip(letters, "rwx", strict=True)):
            raise ValueError(f"{word[:60]!r} has no permissions")
        bits = sum(bit for bit, letter in zip((4, 2, 1), letters, strict=True) if letter != "-")
        if not name:
            entries.append((tags[kind][0], bits, acl.NOBODY))
            continue
        known = number[0] if number and number[0] else name
        id = int(known) if known.isdecimal() else (users if kind == "user" else groups)(name)
        if id is None:
            raise ValueError(f"an ACL for {kind} {name[:40]!r}, whom the archive's own files don't know")
        entries.append((tags[kind][1], bits, id))
    return acl.checked(entries)


def _numbers(entries: list[Entry], path: bytes) -> Callable[[str], int | None]:
    """Looks up names in one of the archive's own files, read when the first is asked for."""
    known: dict[str, int] = {}

    def look_up(name: str) -> int | None:
        if not known:
            file = next((each for each in reversed(entries) if each.path == path and each.is_file), None)
            for line in (file.read(1 << 20) if file else b"").decode(errors="replace").splitlines():
                fields = line.split(":")
                if len(fields) > 2 and fields[2].isdecimal():
                    known.setdefault(fields[0], int(fields[2]))
        return known.get(name)

    return look_up
