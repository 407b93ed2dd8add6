"""The FUSE file system of the daemon: one directory, with one read-only file per layer, and a directory
for each layer that is a tree of files by itself (`ipfs_tree`).

Read by the kernel's loop driver, and by overlayfs; a read blocks until the source has verified bytes, or
fails with EIO at the source's deadline.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pyfuse3

from hostos.live.ipfs_tree import Node, Tree
from hostos.live.source import BlockSource, SourceError
from hostos.live.unixfs import Symlink

_ROOT = pyfuse3.ROOT_INODE
_FOREVER = 86400.0

READ_AHEAD_KIB = 32
"""How much the kernel may read ahead of the loop driver. Measured with 64 KiB pieces: without it
every page is a request of its own (12 times as many), with its default of 128 a tenth more is
fetched; below a piece it costs next to nothing."""


class Files(pyfuse3.Operations):  # type: ignore[misc]
    """Files by name. Inode numbers are never used twice, so nothing stale can be reached."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, BlockSource] = {}
        self._nodes: dict[int, tuple[Tree, Node]] = {}
        self._names: dict[bytes, int] = {}
        self._next = _ROOT + 1

    def add(self, name: str, source: BlockSource) -> None:
        """Show `source` as the file `name`, which must be new."""
        key = name.encode()
        if key in self._names:
            raise ValueError(f"{name} is there already")
        self._names[key] = self._next
        self._sources[self._next] = source
        self._next += 1

    def add_tree(self, name: str, tree: Tree) -> None:
        """Show `tree` as the directory `name`, which must be new."""
        key = name.encode()
        if key in self._names:
            raise ValueError(f"{name} is there already")
        self._names[key] = self._number(tree, tree.root)

    def _number(self, tree: Tree, node: Node) -> int:
        if not node.number:
            node.number = self._next
            self._nodes[node.number] = (tree, node)
            self._next += 1
        return node.number

    def remove(self, name: str) -> None:
        """Hide the file or tree. Whoever still has it open gets EIO."""
        inode = self._names.pop(name.encode(), None)
        if inode in self._nodes:
            gone = self._nodes[inode][0]
            self._nodes = {number: item for number, item in self._nodes.items() if item[0] is not gone}
        elif inode is not None:
            del self._sources[inode]

    # --- what the kernel asks -----------------------------------------------------------------------

    def _attributes(self, inode: int) -> Any:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_nlink = 1
        if inode == _ROOT:
            entry.st_mode = stat.S_IFDIR | 0o555
        elif source := self._sources.get(inode):
            entry.st_mode = stat.S_IFREG | 0o444
            entry.st_size = source.size
            entry.st_blocks = -(-source.size // 512)
        elif found := self._nodes.get(inode):
            return self._of_node(*found)
        else:
            raise pyfuse3.FUSEError(errno.ENOENT)
        entry.attr_timeout = _FOREVER
        entry.entry_timeout = 0  # a name may be reused for another inode
        return entry

    def _of_node(self, tree: Tree, node: Node) -> Any:
        facts = tree.attributes(node)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_nlink, entry.st_mode = self._number(tree, node), 1, facts.mode
        entry.st_size, entry.st_blocks = facts.size, -(-facts.size // 512)
        entry.st_uid = entry.st_gid = facts.owner
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = facts.mtime
        # A tree never changes; only whether it is there, which is asked at its top.
        entry.attr_timeout = _FOREVER
        entry.entry_timeout = 0 if node is tree.root else _FOREVER
        return entry

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return self._attributes(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        if parent := self._nodes.get(parent_inode):
            tree, directory = parent
            try:
                node = await tree.lookup(directory, name)
            except SourceError:
                raise pyfuse3.FUSEError(errno.EIO) from None
            if node is not None:
                return self._of_node(tree, node)
            nothing = pyfuse3.EntryAttributes()
            nothing.entry_timeout = _FOREVER  # inode 0: it may be remembered that there is none
            return nothing
        inode = self._names.get(name) if parent_inode == _ROOT else None
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(inode)

    async def statfs(self, ctx: Any) -> Any:
        """overlayfs asks how long names may be."""
        facts = pyfuse3.StatvfsData()
        facts.f_bsize = facts.f_frsize = 4096
        facts.f_namemax = 255
        return facts

    async def listxattr(self, inode: int, ctx: Any) -> list[bytes]:
        return []

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        found = self._nodes.get(inode)
        if found is None or not isinstance(found[1].kind, Symlink):
            raise pyfuse3.FUSEError(errno.EINVAL)
        return found[1].kind.target

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        if found := self._nodes.get(fh):
            await self._list(*found, start_id, token)
            return
        for name, inode in sorted(self._names.items(), key=lambda item: item[1]):
            # The identifier of an entry must be larger than those before it: the inode is.
            if inode > start_id and not pyfuse3.readdir_reply(token, name, self._attributes(inode), inode):
                return

    async def _list(self, tree: Tree, directory: Node, start: int, token: Any) -> None:
        try:
            names = await tree.names(directory)
            for place, name in enumerate(names[start:], start + 1):
                node = await tree.lookup(directory, name)
                if node and not pyfuse3.readdir_reply(token, name, self._of_node(tree, node), place):
                    return
        except SourceError:
            raise pyfuse3.FUSEError(errno.EIO) from None

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        # The content never changes, so what the kernel has cached stays right.
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        source, found = self._sources.get(fh), self._nodes.get(fh)
        try:
            if found is not None:
                return await found[0].read(found[1], off, size)
            if source is None:
                raise pyfuse3.FUSEError(errno.EIO)
            return await source.read(off, size)
        except SourceError:
            raise pyfuse3.FUSEError(errno.EIO) from None


def mount(files: Files, mountpoint: Path) -> None:
    """Mount it; `pyfuse3.main()` then serves. Raises OSError/RuntimeError if FUSE is missing."""
    options = set(pyfuse3.default_options)
    options |= {"fsname=hostos-live", "subtype=hostos", "ro", "allow_other"}
    pyfuse3.init(files, str(mountpoint), options)


def set_read_ahead(mountpoint: Path, kib: int) -> None:
    """How much the kernel reads beyond what is asked for.

    Its guess costs bytes on the link, and the source does its own. Not vital: an error is ignored.
    Call from a thread: it asks the file system, which this process serves.
    """
    try:
        device = mountpoint.stat().st_dev
        control = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        control.write_text(str(kib))
    except OSError:
        pass
