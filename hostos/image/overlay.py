"""What layers mean on top of each other: overlayfs's rules, applied to lists of entries.

https://docs.kernel.org/filesystems/overlayfs.html. In a layer
- a character device 0:0 (a *whiteout*) removes the name from what is below;
- a directory with `trusted.overlay.opaque` = `y` hides the directory below, one without is merged with it;
- a directory with `trusted.overlay.redirect` is merged with another one below (it was renamed).
The attributes of a merged directory are those of the topmost.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from hostos.errors import UserError
from hostos.image.entries import Entry, arrange

PREFIX = b"trusted.overlay."
UNPRIVILEGED_PREFIX = b"user.overlay."
"""What overlayfs mounted in a user namespace (`userxattr`) writes instead."""
OPAQUE = (PREFIX + b"opaque", b"y")
_CHUNK = 1 << 20
# The others (origin, impure, nlink, upper, uuid …) say where a copy came from, on the machine it was made on.
_MEANING = (b"opaque", b"redirect")


@dataclass
class Node:
    """`entry`: with all properties, also for a hard link; `file`: the same for all names of one file."""

    entry: Entry
    file: object = None
    children: dict[bytes, Node] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.entry.mode)

    def find(self, path: bytes) -> Node | None:
        node: Node | None = self
        for part in path.split(b"/"):
            if part:
                node = node.children.get(part) if node else None
        return node


@dataclass(frozen=True)
class Tree:
    """What is seen through layers: no whiteouts, no overlay attributes."""

    root: Node

    def __len__(self) -> int:
        return sum(1 for _ in _walk(self.root))

    def entries(self) -> list[Entry]:
        """As `arrange` gives them."""
        first: dict[object, bytes] = {}
        result = []
        for path, node in _walk(self.root):
            name = path if node.is_directory else first.setdefault(node.file, path)
            result.append(replace(node.entry, path=path, link=None if name == path else name))
        return result


def whiteout(path: bytes) -> Entry:
    return Entry(path, stat.S_IFCHR)


def is_whiteout(entry: Entry) -> bool:
    if stat.S_ISREG(entry.mode):
        # The other spelling, since Linux 6.7.
        return any(key == PREFIX + b"whiteout" for key, _ in entry.xattrs)
    return stat.S_ISCHR(entry.mode) and entry.major == entry.minor == 0


def opaque(entry: Entry) -> Entry:
    """The directory `entry`, marked as hiding what is below it."""
    return replace(entry, xattrs=tuple(sorted({*entry.xattrs, OPAQUE})))


def from_upper(entries: Iterable[Entry], *, prefix: bytes = PREFIX) -> list[Entry]:
    """The upper directory of an overlay as a layer: `prefix` is how its attributes begin.

    Kept are those that mean something on another machine.
    """

    def kept(entry: Entry) -> Iterator[tuple[bytes, bytes]]:
        for key, value in entry.xattrs:
            if not key.startswith(prefix):
                yield key, value
            elif key[len(prefix) :] in _MEANING and stat.S_ISDIR(entry.mode):
                yield PREFIX + key[len(prefix) :], value

    def hides(entry: Entry) -> bool:
        return is_whiteout(replace(entry, xattrs=tuple((k.replace(prefix, PREFIX, 1), v) for k, v in entry.xattrs)))

    found = list(entries)
    # The kernel makes all whiteouts names of one device.
    hidden = {entry.path for entry in found if hides(entry)}
    return [
        whiteout(entry.path)
        if entry.path in hidden or entry.link in hidden
        else replace(entry, xattrs=tuple(sorted(kept(entry))))
        for entry in found
    ]


def merge(layers: Sequence[list[Entry]]) -> Tree:
    """The tree that `layers` (lowest first, each arranged) make."""
    tree = Tree(Node(Entry(b"", stat.S_IFDIR | 0o755)))
    for number, entries in enumerate(layers):
        tree = on_top(tree, entries, number)
    return tree


def on_top(tree: Tree, entries: list[Entry], number: int) -> Tree:
    """`tree` (which stays as it is) with one more layer; `number`: another for each layer of a tree."""
    return Tree(_over(tree.root, _grow(entries, number)))


def complete(entries: Iterable[Entry], lower: Tree, what: str) -> list[Entry]:
    """`entries` of a layer arranged, with directories it only passes through as they are in `lower`.

    Raises UserError as `arrange` does.
    """
    found = list(entries)
    named = {entry.path for entry in found}
    missing: dict[bytes, Entry] = {}
    for entry in found:
        path = entry.path
        while path:
            path = path.rpartition(b"/")[0]
            if path in named or path in missing:
                continue
            if (node := lower.root.find(path)) and node.is_directory:
                missing[path] = replace(node.entry, path=path)
    return arrange([*missing.values(), *found], what)


def difference(lower: Tree, upper: Tree) -> list[Entry]:
    """The layer that makes `lower` into `upper`, arranged: least in number, and exact; empty if they are equal.

    Names of one file stay one file: if one of them changes, all of them are in the layer.
    """
    names_below, names_above = _names(lower), _names(upper)
    changed = {
        file
        for file, paths in names_above.items()
        if any((node := lower.root.find(path)) is None or names_below.get(node.file) != paths for path in paths)
    }
    result: list[Entry] = []
    pending: list[tuple[bytes, Node | None, Node]] = [(b"", lower.root, upper.root)]
    while pending:
        path, below, above = pending.pop()
        entry = replace(above.entry, path=path)
        if not above.is_directory:
            if below is None or below.is_directory or above.file in changed or not _same(below.entry, entry):
                changed.add(above.file)
                result.append(entry)
            continue
        if below is None or not below.is_directory:
            result.append(entry)
            below_children: dict[bytes, Node] = {}
        else:
            if not _same(below.entry, entry):
                result.append(entry)
            below_children = below.children
            result += [whiteout(_join(path, name)) for name in below.children.keys() - above.children.keys()]
        pending += [(_join(path, name), below_children.get(name), node) for name, node in above.children.items()]
    if not result:
        return []
    # A file may have been found changed after one of its names had been passed.
    have = {entry.path for entry in result}
    for file in changed:
        for path in names_above[file] - have:
            node = upper.root.find(path)
            assert node is not None
            result.append(replace(node.entry, path=path))
    return complete(_linked(result, upper), upper, "the differences")


def changes(lower: Tree, layer: list[Entry]) -> Iterator[tuple[str, bytes]]:
    """For people: `A` (added), `C` (changed) or `D` (deleted), and the path, of a `difference`."""
    for entry in layer:
        below = lower.root.find(entry.path)
        if is_whiteout(entry):
            yield "D", entry.path
        elif below is None:
            yield "A", entry.path
        elif not _same(replace(below.entry, mtime=0), replace(entry, mtime=0)) or not stat.S_ISDIR(entry.mode):
            # That something in a directory changed is said by what changed.
            yield "C", entry.path


# --- how --------------------------------------------------------------------------------------------


def _walk(root: Node) -> Iterator[tuple[bytes, Node]]:
    """Parents before children, in the order `arrange` uses."""
    pending = [(b"", root)]
    while pending:
        path, node = pending.pop()
        yield path, node
        pending += [(_join(path, name), node.children[name]) for name in sorted(node.children, reverse=True)]


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name


def _grow(entries: list[Entry], number: int) -> Node:
    root = Node(Entry(b"", stat.S_IFDIR | 0o755))
    nodes = {b"": root}
    for entry in entries:
        node = Node(replace(entry, link=None), (number, entry.link or entry.path))
        if entry.path:
            parent, _, name = entry.path.rpartition(b"/")
            nodes[parent].children[name] = node
        else:
            root.entry = node.entry
            node = root
        nodes[entry.path] = node
    return root


def _over(lower: Node, upper: Node) -> Node:
    """`upper` on top of `lower`. Neither is changed; what only one of them has is shared with it."""
    result = Node(_plain(upper.entry), upper.file)
    pending: list[tuple[Node | None, Node, Node]] = [(lower, upper, result)]
    while pending:
        below, above, out = pending.pop()
        if below is None or not below.is_directory or OPAQUE in above.entry.xattrs:
            below = None
        out.children = dict(below.children) if below else {}
        for name, child in above.children.items():
            if is_whiteout(child.entry):
                out.children.pop(name, None)
                continue
            merged = Node(_plain(child.entry), child.file)
            out.children[name] = merged
            if child.is_directory:
                source = below.children.get(name) if below else None
                if (redirect := dict(child.entry.xattrs).get(PREFIX + b"redirect")) is not None:
                    source = lower.find(redirect) if redirect.startswith(b"/") else below and below.find(redirect)
                pending.append((source, child, merged))
    return result


def _plain(entry: Entry) -> Entry:
    return replace(entry, xattrs=tuple(item for item in entry.xattrs if not item[0].startswith(PREFIX)))


def _names(tree: Tree) -> dict[object, set[bytes]]:
    """All names of each file."""
    found: dict[object, set[bytes]] = {}
    for path, node in _walk(tree.root):
        if not node.is_directory:
            found.setdefault(node.file, set()).add(path)
    return found


def _linked(entries: list[Entry], tree: Tree) -> list[Entry]:
    """`entries` with the names of one file made hard links of the first."""
    first: dict[object, bytes] = {}
    result = []
    for entry in sorted(entries, key=lambda entry: entry.path.split(b"/")):
        node = tree.root.find(entry.path)
        if node is None or node.is_directory or is_whiteout(entry):
            result.append(entry)
            continue
        name = first.setdefault(node.file, entry.path)
        result.append(replace(entry, link=None if name == entry.path else name))
    return result


def _same(one: Entry, other: Entry) -> bool:
    def properties(entry: Entry) -> tuple[object, ...]:
        return (entry.mode, entry.uid, entry.gid, entry.mtime, entry.size, entry.target, entry.major, entry.minor,
                entry.xattrs)  # fmt: skip

    if properties(one) != properties(other):
        return False
    if not stat.S_ISREG(one.mode):
        return True
    return all(left == right for left, right in zip(_data(one), _data(other), strict=True))


def _data(entry: Entry) -> Iterator[bytes]:
    """All of a file in chunks of `_CHUNK`, holes as zeros."""
    if entry.open is None:
        return
    with entry.open() as file:
        left = entry.size
        while left:
            # Both readers of tar members and plain files give holes as zeros.
            data = file.read(min(left, _CHUNK))
            if not data:
                raise UserError(f"{entry.name} became shorter while it was read", "try again when nothing writes to it")
            left -= len(data)
            yield data
