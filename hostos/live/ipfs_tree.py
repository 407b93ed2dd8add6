"""A UnixFS directory tree, file by file: what the FUSE file system shows when a CID is that of a plain tree.

UnixFS knows no owners: everything belongs to root (of the container: `owner`). Modes and times are those of
the tree where it has them (UnixFS 1.5). Where it has not: directories 0755, files 0755, too, since a tree
in which nothing can be executed cannot be booted; times 0.
"""

from __future__ import annotations

import stat
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import trio

from hostos.live import unixfs
from hostos.live.blocks import Blocks
from hostos.live.cid import Cid
from hostos.live.dagpb import BlockError
from hostos.live.gateways import Gateways
from hostos.live.journal import Journal
from hostos.live.schedule import Schedule
from hostos.live.source import ReadAhead, SourceError, SourceStats, Waits
from hostos.live.unixfs import Directory, File, Symlink

DIRECTORY_MODE, FILE_MODE, SYMLINK_MODE = 0o755, 0o755, 0o777


@dataclass
class Node:
    """Something in the tree. `number`: its inode, once it has one; `children`: of a directory that was read."""

    cid: Cid
    kind: File | Directory | Symlink
    number: int = 0
    children: dict[bytes, Cid] | None = None
    known: dict[bytes, Node] = field(default_factory=dict)
    ahead: ReadAhead = field(default_factory=lambda: ReadAhead(4))


@dataclass(frozen=True)
class Attributes:
    """As stat(2) has them; `mtime` in nanoseconds."""

    mode: int
    size: int
    owner: int
    mtime: int


class Tree:
    """The tree below a CID. Errors of reading are `SourceError`; what is unsound is such an error, too.

    It has the figures of a source, so that `stats` and the rest need not know the difference.
    """

    def __init__(
        self, blocks: Blocks, gateways: Gateways, cid: Cid, root: Directory, size: int, *, owner: int, deadline: float
    ) -> None:
        self._blocks, self.gateways, self.cid = blocks, gateways, cid
        self.owner, self.deadline = owner, deadline
        self.root = Node(cid, root)
        self.journal = Journal(1)
        self.schedule = Schedule(1, 1, lambda _piece: True, lambda _piece, _milliseconds: None)
        self._waits = Waits()
        self._stats = SourceStats(size=size)
        self._seen: set[Cid] = set()
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()

    def start(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as self._nursery:
                await trio.sleep_forever()

    async def close(self) -> None:
        self._scope.cancel()
        await self.gateways.close()

    def replay(self, pieces: Iterable[int]) -> deque[int]:
        """There is no order in which a tree is read."""
        return self.schedule.replay(())

    # --- blocks -----------------------------------------------------------------------------------

    async def _fetch(self, cid: Cid) -> bytes:
        if (block := self._blocks.peek(cid)) is None:
            began = time.monotonic()
            try:
                block = await self._blocks.get(cid, self.gateways, self.deadline)
            except SourceError as error:
                self._stats.errors += 1
                self._stats.last_error = str(error.strerror)
                raise
            self._stats.misses += 1
            self._waits.add(time.monotonic() - began)
        self._note(cid, len(block))
        return block

    def _note(self, cid: Cid, size: int) -> None:
        if cid not in self._seen:
            self._seen.add(cid)
            self._stats.verified += size

    def _unsound(self, error: BlockError) -> SourceError:
        self._stats.errors += 1
        self._stats.last_error = f"the tree is not sound: {error}"
        return SourceError(self._stats.last_error)

    # --- the tree ---------------------------------------------------------------------------------

    async def _entries(self, node: Node) -> dict[bytes, Cid]:
        if node.children is None:
            assert isinstance(node.kind, Directory)
            try:
                found = await unixfs.entries(node.kind, self._fetch)
            except BlockError as error:
                raise self._unsound(error) from None
            node.children = {name: link.cid for name, link in found.items()}
        return node.children

    async def lookup(self, node: Node, name: bytes) -> Node | None:
        """The entry of a directory with this name. Raises SourceError."""
        if not isinstance(node.kind, Directory):
            return None
        if (known := node.known.get(name)) is not None:
            return known
        cid = (await self._entries(node)).get(name)
        if cid is None:
            return None
        try:
            kind = unixfs.decode(cid, await self._fetch(cid))
        except BlockError as error:
            raise self._unsound(error) from None
        # Somebody else may have looked it up meanwhile: one entry has one inode.
        return node.known.setdefault(name, Node(cid, kind))

    async def names(self, node: Node) -> list[bytes]:
        """The names in a directory, all of them ready to be looked up. Raises SourceError."""
        entries = await self._entries(node)
        missing = tuple(cid for name, cid in entries.items() if name not in node.known)
        await unixfs.in_parallel(tuple(dict.fromkeys(missing)), self._fetch, {})
        return list(entries)

    def attributes(self, node: Node) -> Attributes:
        kind = node.kind
        seconds, nanoseconds = kind.mtime or (0, 0)
        mtime = max(0, seconds) * 10**9 + (nanoseconds if seconds >= 0 else 0)
        if isinstance(kind, Directory):
            mode, form, size = DIRECTORY_MODE, stat.S_IFDIR, 0
        elif isinstance(kind, Symlink):
            mode, form, size = SYMLINK_MODE, stat.S_IFLNK, len(kind.target)
        else:
            mode, form, size = FILE_MODE, stat.S_IFREG, kind.size
        if kind.mode is not None and not isinstance(kind, Symlink):
            mode = kind.mode
        return Attributes(form | mode, size, self.owner, min(mtime, (1 << 63) - 1))

    async def read(self, node: Node, offset: int, length: int) -> bytes:
        """Bytes of a file. Raises SourceError."""
        if not isinstance(node.kind, File):
            return b""
        self._stats.reads += 1
        end = min(offset + length, node.kind.size)
        try:
            data = await unixfs.read(node.kind, offset, end, self._fetch)
        except BlockError as error:
            raise self._unsound(error) from None
        self._stats.read_bytes += len(data)
        if self._nursery is not None and (units := node.ahead.pieces(offset >> 17, (max(end, 1) - 1) >> 17)):
            self._nursery.start_soon(self._look_ahead, node.kind, end, units << 17)
        return data

    async def _look_ahead(self, file: File, start: int, length: int) -> None:
        async def fetch(cid: Cid) -> bytes:
            return await self._blocks.get(cid, self.gateways, self.deadline, ahead=True)

        try:
            if start < file.size:
                await unixfs.read(file, start, start + length, fetch)
        except (BlockError, SourceError):
            pass  # whoever reads it will be told

    # --- telling ----------------------------------------------------------------------------------

    def stats(self) -> SourceStats:
        stats = self._stats
        stats.downloaded, stats.wasted = self.gateways.downloaded, self.gateways.wasted
        stats.hash_failures, stats.stalls = self.gateways.wrong, self.gateways.hedged
        stats.peers, stats.banned = len(self.gateways.all()), self.gateways.banned
        self._waits.into(stats)
        return stats

    def peers(self) -> list[dict[str, Any]]:
        return self.gateways.describe()
