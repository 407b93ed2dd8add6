"""POSIX ACLs of an image's layer: squashfs can't hold them, so the layer has a list of them in a file.

The file `.hostos-acls` in the layer's root is what `getfacl -R -n` prints and `setfacl --restore` reads (acl(5)):
a block per path, `# file: PATH` first. Whoever mounts the layer hides the file and gives the paths their ACLs
(`acl_layer`). In attributes (`system.posix_acl_access`, `…_default`) ACLs are as the kernel has them:
linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hostos.errors import UserError

FILE = b".hostos-acls"
MAX_FILE = 32 << 20
"""Largest list, bytes."""
ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
MAX_VALUE = 1 << 16
"""Largest attribute of Linux, bytes."""

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
NOBODY = 0xFFFFFFFF
"""The id of entries that name nobody."""

Acl = tuple[tuple[int, int, int], ...]
"""Entries: tag, permissions (4 read, 2 write, 1 execute), id."""

_HEAD, _ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
_VERSION = 2
_TAGS = {"user": (USER_OBJ, USER), "group": (GROUP_OBJ, GROUP), "mask": (MASK, MASK), "other": (OTHER, OTHER)}
_WORDS = {USER_OBJ: "user", USER: "user", GROUP_OBJ: "group", GROUP: "group", MASK: "mask", OTHER: "other"}
_LINE = re.compile(rb"(default:)?(user|group|mask|other):([0-9]{0,10}):([r-])([w-])([x-])(\s.*)?")


@dataclass(frozen=True)
class Acls:
    """What a path has. `access`: none if its mode says all; `default`: what is made in a directory starts with."""

    access: Acl = ()
    default: Acl = ()

    def attributes(self) -> tuple[tuple[bytes, bytes], ...]:
        pairs = ((ACCESS, self.access), (DEFAULT, self.default))
        return tuple((name, encode(acl)) for name, acl in pairs if acl)


def decode(value: bytes) -> Acl:
    """An attribute's value. Raises ValueError if it is no ACL that Linux takes."""
    if len(value) > MAX_VALUE or len(value) < _HEAD.size or (len(value) - _HEAD.size) % _ENTRY.size:
        raise ValueError("an ACL of impossible length")
    if _HEAD.unpack_from(value)[0] != _VERSION:
        raise ValueError("an ACL of an unknown version")
    return checked(_ENTRY.iter_unpack(value[_HEAD.size :]))


def encode(acl: Acl) -> bytes:
    return _HEAD.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in acl)


def checked(entries: Iterable[tuple[int, int, int]]) -> Acl:
    """`entries` in the order of the kernel and of acl(5)'s tools. Raises ValueError if Linux would not take them."""
    acl = tuple((tag, bits, id if tag in (USER, GROUP) else NOBODY) for tag, bits, id in entries)
    acl = tuple(sorted(acl, key=lambda entry: (entry[0], entry[2])))
    tags = [tag for tag, _, _ in acl]
    if not set(tags) <= _WORDS.keys() or any(not 0 <= bits <= 7 for _, bits, _ in acl):
        raise ValueError("an ACL with an unknown entry")
    if any(tags.count(tag) != 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER)) or tags.count(MASK) > 1:
        raise ValueError("an ACL without owner, group or others")
    if len({(tag, id) for tag, _, id in acl}) != len(acl) or any(
        id >= NOBODY for tag, _, id in acl if tag in (USER, GROUP)
    ):
        raise ValueError("an ACL that names somebody twice, or nobody")
    if MASK not in tags and (USER in tags or GROUP in tags):
        raise ValueError("an ACL without its mask")
    return acl


def is_minimal(acl: Acl) -> bool:
    """Whether a mode says the same."""
    return len(acl) == 3


def mode_bits(acl: Acl) -> int:
    """The nine bits of the mode of what has this ACL."""
    bits = {tag: bits for tag, bits, _ in acl}
    return bits[USER_OBJ] << 6 | bits.get(MASK, bits[GROUP_OBJ]) << 3 | bits[OTHER]


def of_known(value: bytes) -> bytes:
    """An attribute's value without the entries for users and groups that are nobody here (beyond a container's range):
    Linux tells them, but does not take them."""
    entries = _ENTRY.iter_unpack(value[_HEAD.size :])
    return encode(tuple(entry for entry in entries if entry[0] not in (USER, GROUP) or entry[2] != NOBODY))


# --- the list ---------------------------------------------------------------------------------------


def render(found: Iterable[tuple[bytes, int, Acls]]) -> bytes:
    """The list: path (`b""`: the root), mode and ACLs of each. Raises UserError if it is too large."""
    blocks = []
    for path, mode, acls in found:
        lines = [b"# file: " + _quoted(path)]
        if mode & 0o7000:
            # Without, setfacl takes them away.
            bits = zip((0o4000, 0o2000, 0o1000), b"sst", strict=True)
            lines.append(b"# flags: " + bytes(letter if mode & bit else ord("-") for bit, letter in bits))
        lines += _lines(acls.access or _of_mode(mode), "")
        lines += _lines(acls.default, "default:")
        blocks.append(b"\n".join(lines) + b"\n\n")
    data = b"".join(blocks)
    if len(data) > MAX_FILE:
        raise UserError(
            f"the ACLs of {len(blocks)} files take {len(data)} bytes; a layer has at most {MAX_FILE} of them",
            "remove those that say nothing: setfacl -R -b DIRECTORY",
        )
    return data


def parse(data: bytes) -> dict[bytes, Acls]:
    """The ACLs by path in a list; paths are clean (relative, no `.` or `..`). Raises ValueError."""
    found: dict[bytes, Acls] = {}
    for number, block in _blocks(data):
        try:
            path = _clean(_unquoted(block[0][len(b"# file: ") :]))
            if path in found:
                raise ValueError("a path that was there before")
            access: list[tuple[int, int, int]] = []
            default: list[tuple[int, int, int]] = []
            for line in block[1:]:
                if line.startswith(b"#"):
                    continue  # owner, group, flags: the layer itself says those
                is_default, entry = _entry(line)
                (default if is_default else access).append(entry)
            acl = checked(access) if access else ()
            found[path] = Acls(() if is_minimal(acl) else acl, checked(default) if default else ())
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return found


def _blocks(data: bytes) -> Iterator[tuple[int, list[bytes]]]:
    if len(data) > MAX_FILE:
        raise ValueError(f"more than {MAX_FILE} bytes")
    block: list[bytes] = []
    first = 1
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.startswith(b"# file: "):
            if block:
                yield first, block
            block, first = [line], number
        elif line:
            if not block:
                raise ValueError(f"line {number}: no '# file:' before it")
            block.append(line)
    if block:
        yield first, block


def _entry(line: bytes) -> tuple[bool, tuple[int, int, int]]:
    match = _LINE.fullmatch(line)
    if not match:
        raise ValueError(f"{line[:60]!r} is no entry of an ACL by numbers")
    general, named = _TAGS[match[2].decode()]
    bits = sum(bit for bit, letter in zip((4, 2, 1), match.group(4, 5, 6), strict=True) if letter != b"-")
    return bool(match[1]), (named, bits, int(match[3])) if match[3] else (general, bits, NOBODY)


def _lines(acl: Acl, prefix: str) -> list[bytes]:
    return [
        f"{prefix}{_WORDS[tag]}:{id if tag in (USER, GROUP) else ''}:{permissions(bits)}".encode()
        for tag, bits, id in acl
    ]


def permissions(bits: int) -> str:
    return "".join(letter if bits & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))


def _of_mode(mode: int) -> Acl:
    bits = zip((USER_OBJ, GROUP_OBJ, OTHER), (6, 3, 0), strict=True)
    return tuple((tag, mode >> shift & 7, NOBODY) for tag, shift in bits)


def _quoted(path: bytes) -> bytes:
    """As getfacl writes names."""
    return re.sub(rb"[\\\n\r]", lambda match: b"\\%03o" % match[0][0], path or b".")


def _unquoted(name: bytes) -> bytes:
    return re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes([int(match[1], 8)]), name)


def _clean(path: bytes) -> bytes:
    parts = [] if path == b"." else path.split(b"/")
    if b"\0" in path or any(part in (b"", b".", b"..") for part in parts):
        raise ValueError(f"{path[:60]!r} is no path in the layer")
    return path if parts else b""
