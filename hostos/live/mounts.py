"""Layers as mounted trees, and a container's root over them.

    layer's blocks ─► FUSE file ─► loop device ─► squashfs ─┐
                                   (shared by all containers)├─► id-mapped ─┐
                                 its ACLs, if any (acl_layer)┘              ├─► overlay = root
                                              tmpfs of a given size (upper) ┘

Everything is undone in reverse order, on success and on failure. The system calls run in threads:
a mount reads the file system this very process serves, and would wait for itself for ever.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import trio

from hostos.errors import UserError, failure
from hostos.live import acl, acl_layer, dmcrypt, syscalls
from hostos.live.blocks import Blocks
from hostos.live.container import Bind
from hostos.live.fuse import Files
from hostos.live.gateways import Gateways
from hostos.live.ipfs_image import IpfsLayer, IpfsTree
from hostos.live.ipfs_source import IpfsSource
from hostos.live.ipfs_tree import Tree
from hostos.live.ledger import Endpoint
from hostos.live.pieces import PieceHashes
from hostos.live.schedule import REST_OFF, Rest
from hostos.live.session import Swarm
from hostos.live.torrent_source import TorrentSource, from_torrent
from hostos.live.torrents import Torrent
from hostos.live.url import Url
from hostos.live.web_seeds import WebSeeds

UNMOUNT_PATIENCE = 5.0


AnyLayer = Torrent | IpfsLayer | IpfsTree
"""What names a layer, and where it comes from. `info_hash` is what it is known by here."""


@dataclass
class MountedLayer:
    """A layer in use. `path`: its tree; `acls`: what in it has ACLs, if anything; `users`: how many containers
    have it."""

    torrent: AnyLayer
    source: TorrentSource | IpfsSource | Tree
    path: Path
    users: int = 0
    key: bytes = b""
    """Fingerprint of the key it was decrypted with, if it was."""
    plans: list[deque[int]] = field(default_factory=list)
    """What is still to be fetched ahead, by user."""
    acls: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """What to lay over each other, lowest first."""
        return [self.path, *([self.acls] if self.acls else [])]

    def drop(self, plan: deque[int]) -> None:
        """Whoever wanted this has gone."""
        self.source.schedule.drop(plan)
        self.plans = [other for other in self.plans if other is not plan]


class Layers:
    """The mounted layers, each mounted once however many containers use it.

    `files`: the FUSE file system mounted at `fuse`; `cache`: where content is kept;
    `place`: directory for the mount points.
    """

    def __init__(self, swarm: Swarm, nursery: trio.Nursery, files: Files, fuse: Path, cache: Path, place: Path) -> None:
        self._swarm, self._nursery, self._files = swarm, nursery, files
        self._fuse, self._cache, self._place = fuse, cache, place
        self._mounted: dict[str, MountedLayer] = {}
        self.still = trio.Lock()
        """Held while layers are mounted and unmounted; whoever removes some from the cache holds it, too."""
        self.changed = trio.Event()
        """Set, and replaced, when a layer was mounted or unmounted."""
        self.used: Callable[[str], None] = lambda _layer: None
        self.rest = REST_OFF
        self.blocks = Blocks(nursery, cache.parent / "blocks", swarm.log)

    def using(self, layers: Iterable[str]) -> bool:
        """Whether any of these is mounted."""
        return any(layer in self._mounted for layer in layers)

    def mounted(self) -> list[MountedLayer]:
        return list(self._mounted.values())

    async def acquire(
        self,
        torrent: AnyLayer,
        peers: Iterable[Endpoint],
        deadline: float,
        *,
        ahead: Sequence[int] = (),
        rest: Rest | None = None,
        exact: bool = False,
        web: Sequence[Url] = (),
        key: bytes | None = None,
    ) -> MountedLayer:
        """The layer, mounted. Raises UserError when its first blocks can't be had by `deadline`.

        `ahead`: pieces to be fetched before they are asked for; `rest`: whether all others are, too;
        `exact`: note each read as it is made, unless the layer is mounted already; `web`: servers that have it;
        `key`: of an encrypted one.
        """
        async with self.still:
            layer = self._mounted.get(torrent.info_hash)
            if layer is None:
                source = self._open(torrent, peers, web, deadline, rest or self.rest)
                layer = await self._mount(torrent, source, ahead, exact, key)
                self._mounted[torrent.info_hash] = layer
                self.used(torrent.info_hash)
                self._tell()
            else:
                if layer.key != _fingerprint(key):
                    raise UserError(f"layer {torrent.info_hash[:16]}…: {_WRONG_KEY}", _KEY_HINT)
                if rest:
                    layer.source.schedule.fetch_rest(rest)
                layer.plans.append(layer.source.replay(ahead))
                if isinstance(layer.source, TorrentSource):
                    for peer in peers:
                        layer.source.ledger.add(peer)
                    for url in web:
                        layer.source.add_web_seed(url)
                elif isinstance(torrent, IpfsLayer | IpfsTree):
                    for url in torrent.gateways:
                        layer.source.gateways.add(url)
                layer.source.deadline = max(layer.source.deadline, deadline)
            layer.users += 1
            return layer

    async def release(self, layer: MountedLayer) -> None:
        """Unmount it if this was its last user. Never raises; shielded from cancellation."""
        with trio.CancelScope(shield=True):
            async with self.still:
                layer.users -= 1
                if layer.users:
                    return
                del self._mounted[layer.torrent.info_hash]
                if layer.acls:
                    await trio.to_thread.run_sync(_unmount, layer.acls)
                if not isinstance(layer.source, Tree):
                    await trio.to_thread.run_sync(_unmount, layer.path)
                self._files.remove(layer.torrent.info_hash)
                await layer.source.close()
                self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def _open(
        self, torrent: AnyLayer, peers: Iterable[Endpoint], web: Sequence[Url], deadline: float, rest: Rest
    ) -> TorrentSource | IpfsSource | Tree:
        source: TorrentSource | IpfsSource
        if isinstance(torrent, IpfsTree):
            gateways = Gateways(torrent.gateways, self._swarm.log)
            return Tree(
                self.blocks, gateways, torrent.cid, torrent.root, torrent.size, owner=torrent.owner, deadline=deadline
            )
        if isinstance(torrent, IpfsLayer):
            gateways = Gateways(torrent.gateways, self._swarm.log)
            source = IpfsSource(self.blocks, gateways, torrent.cid, torrent.root, torrent.piece_size, deadline=deadline)
            source.schedule.fetch_rest(rest)
            return source
        source = TorrentSource(
            self._swarm,
            from_torrent(torrent.data),
            self._cache / torrent.info_hash,
            peers,
            deadline=deadline,
            hashes=PieceHashes(torrent.data),
            web=WebSeeds(web, self._swarm.log),
            web_path=f"/layers/{torrent.info_hash}/{torrent.name}",
        )
        source.schedule.fetch_rest(rest)
        return source

    async def _mount(
        self,
        torrent: AnyLayer,
        source: TorrentSource | IpfsSource | Tree,
        ahead: Sequence[int],
        exact: bool,
        key: bytes | None,
    ) -> MountedLayer:
        path = self._place / torrent.info_hash
        if exact:
            source.journal.watch()
        source.start(self._nursery)
        plan = source.replay(ahead)
        if isinstance(source, Tree):
            self._files.add_tree(torrent.info_hash, source)
            return MountedLayer(torrent, source, self._fuse / torrent.info_hash, plans=[plan])
        self._files.add(torrent.info_hash, source)
        acls = path.with_name(f"{path.name}.acls")
        try:
            await trio.to_thread.run_sync(_mount_squashfs, self._fuse / torrent.info_hash, path, exact, key)
            has_acls = await trio.to_thread.run_sync(acl_layer.mount, path, acls)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_unmount, acls)
                await trio.to_thread.run_sync(_unmount, path)
                self._files.remove(torrent.info_hash)
                stats = source.stats()
                await source.close()
            if isinstance(error, OSError):
                raise _why(torrent, stats.last_error, error, encrypted=key is not None) from None
            raise
        return MountedLayer(torrent, source, path, key=_fingerprint(key), plans=[plan], acls=acls if has_acls else None)


_WRONG_KEY = "the key is not this image's"
_KEY_HINT = "hostos image link prints it, where the image was published"


def _fingerprint(key: bytes | None) -> bytes:
    return sha256(key).digest() if key else b""


def _why(torrent: AnyLayer, last_error: str, error: OSError, *, encrypted: bool) -> UserError:
    if last_error:
        whom = "--peer HOST:PORT" if isinstance(torrent, Torrent) else "--gateway URL"
        return failure(f"layer {torrent.info_hash[:16]}…: {last_error}", f"name another {whom}")
    if error.errno == errno.EINVAL and encrypted:
        return UserError(f"layer {torrent.info_hash[:16]}…: {_WRONG_KEY}", _KEY_HINT)
    if error.errno == errno.EINVAL:
        return failure(f"layer {torrent.info_hash[:16]}… holds no squashfs this kernel can mount")
    return failure(f"layer {torrent.info_hash[:16]}… cannot be mounted: {error}")


def _mount_squashfs(file: Path, path: Path, exact: bool, key: bytes | None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    device, descriptor = syscalls.attach_loop(file, direct=exact)
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        if key is not None:
            device = str(stack.enter_context(dmcrypt.opened(device, file.stat().st_size, key)))
        flags = syscalls.MS_RDONLY | syscalls.MS_NODEV | syscalls.MS_NOATIME
        try:
            # Without it every reader of the layer waits for the one that is decompressing.
            syscalls.mount(device, path, "squashfs", flags, "threads=percpu")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A kernel built without the choice of decompressors.
            syscalls.mount(device, path, "squashfs", flags)


def _unmount(path: Path) -> None:
    syscalls.unmount_patiently(path, UNMOUNT_PATIENCE)
    with suppress(OSError):
        path.rmdir()


def mount_root(
    stack: ExitStack,
    layers: list[Path],
    place: Path,
    *,
    base: int | None,
    upper_size: str,
    metacopy: bool = False,
    shifted: Collection[Path] = (),
    kept: Path | None = None,
) -> Path:
    """An overlay over `layers` (lowest first) with a tmpfs on top; the path of the root.

    `kept`: a directory instead of the tmpfs, with what an earlier container of this `base` left there.
    `shifted`: the layers whose owners are the container's already. `base`: first user of the container's
    range (None: the container's users are the machine's).
    `upper_size`: size of the tmpfs as mount(8) takes it, e.g. `256m` or `50%`. `metacopy`: some layers hold
    only metadata of what is below them (`acl_layer`). What must be undone goes onto `stack`. Raises OSError.
    """
    place.mkdir(parents=True, exist_ok=True)
    stack.callback(_remove, place)
    root = _directory(stack, place / "root")
    if kept is not None:
        upper = kept
    else:
        upper = _directory(stack, place / "upper")
        syscalls.mount("hostos-upper", upper, "tmpfs", syscalls.MS_NODEV, f"size={upper_size},mode=0700")
        stack.callback(_unmount_only, upper)
    lowers = list(layers)
    # The overlay keeps its own reference to each lower mount: the id-mapped ones are needed only
    # until it exists.
    with ExitStack() as temporary:
        if base is not None:
            namespace = syscalls.user_namespace(base)
            temporary.callback(os.close, namespace)
            lowers = []
            for index, layer in enumerate(layers):
                if layer in shifted:
                    lowers.append(layer)
                    continue
                lower = _directory(temporary, place / f"lower{index}")
                syscalls.mount_idmapped(layer, lower, namespace)
                temporary.callback(_unmount_only, lower)
                lowers.append(lower)
        changes, work = upper / "changes", upper / "work"
        work.mkdir(exist_ok=True)
        if not changes.exists():
            _make_root_directory(changes, lowers[-1])
        # By descriptor: mount(2) takes a page of options, which 64 paths would not fit into.
        opened = []
        for lower in reversed(lowers):
            opened.append(os.open(lower, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            temporary.callback(os.close, opened[-1])
        options = ",".join(
            (
                "lowerdir=" + ":".join(f"/proc/self/fd/{descriptor}" for descriptor in opened),
                f"upperdir={changes}",
                f"workdir={work}",
                # Lets directories of a layer be renamed (dpkg does).
                "redirect_dir=on",
                *(["metacopy=on"] if metacopy else []),
                # What goes with the container needs not be synced.
                *(["volatile"] if kept is None else []),
            )
        )
        syscalls.mount("hostos-root", root, "overlay", syscalls.MS_NODEV, options)
        stack.callback(_unmount_only, root)
    return root


def _make_root_directory(path: Path, below: Path) -> None:
    """The upper directory, from which the root directory's own owner, mode, times and attributes come."""
    top = below.stat()
    path.mkdir()
    os.chown(path, top.st_uid, top.st_gid)
    path.chmod(stat.S_IMODE(top.st_mode))
    for name, value in acl_layer.attributes(below).items():
        os.setxattr(path, name, acl.of_known(value) if name.encode() in (acl.ACCESS, acl.DEFAULT) else value)
    os.utime(path, ns=(top.st_atime_ns, top.st_mtime_ns))


def check_binds(binds: tuple[Bind, ...], base: int | None) -> tuple[Bind, ...]:
    """`binds`, each knowing whether its file system lets owners be shifted to `base`."""
    if base is None or not binds:
        return binds
    with ExitStack() as stack:
        namespace = syscalls.user_namespace(base)
        stack.callback(os.close, namespace)
        return tuple(replace(bind, shifted=syscalls.can_idmap(Path(bind.source), namespace)) for bind in binds)


def _directory(stack: ExitStack, path: Path) -> Path:
    path.mkdir(exist_ok=True)
    stack.callback(_remove, path)
    return path


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()


def _unmount_only(path: Path) -> None:
    syscalls.unmount_patiently(path, UNMOUNT_PATIENCE)


def mounts_below(place: Path) -> list[Path]:
    """Mount points below a directory, innermost first (proc(5), mountinfo)."""
    found = []
    prefix = str(place) + "/"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # Spaces and the like are written as \040.
        point = line.split()[4].encode().decode("unicode_escape")
        if point.startswith(prefix):
            found.append(Path(point))
    return found[::-1]


def clean_up(place: Path) -> int:
    """Detach whatever an earlier daemon left mounted below `place`; how many there were.

    Its FUSE connection is gone, so nothing that is left can be read ("Transport endpoint is not
    connected"); detaching works all the same and waits for nobody.
    """
    left = mounts_below(place)
    for point in left:
        with suppress(OSError):
            syscalls.unmount(point, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    return len(left)


async def in_thread(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """Run something that makes system calls; not abandoned on cancellation, as it can't be undone."""
    return await trio.to_thread.run_sync(partial(function, *arguments, **keywords))
