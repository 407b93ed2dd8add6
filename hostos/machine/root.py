"""A machine whose root is an image of the network: what its kernel and its archive tell it (docs/root.md).

Who has the image is found out by whoever joins machines and images: `finder`, set by `hostos.cli`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hostos.errors import UserError
from hostos.machine.network import HOST_FROM_GUEST

if TYPE_CHECKING:
    from hostos.machine.options import UpOptions
    from hostos.machine.watch import Watch
    from hostos.steps import Steps

NONE = "none"
"""`--root none`: the machine's own system again."""
ABILITY = "root"
"""What an OS build mounts that can do this (OsImage.mounts)."""
FIRST_PROCESS = "/usr/lib/hostos/root"
MIN_MEMORY_MIB = 384
"""Its own system and the client stay in memory below the image's, beside what is fetched and written."""
_IMAGE = re.compile(r"[0-9A-Za-z]{32,128}")
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_SAID = re.compile(r"hostos: root: (.+)")


@dataclass(frozen=True)
class Source:
    """Who has an image: `HOST:PORT` (127.0.0.1 is this host) or gateways; `metadata`: what the guest then need
    not fetch first."""

    peers: tuple[str, ...]
    metadata: bytes = b""


Finder = Callable[[str, tuple[str, ...], bool], Source]
"""Given an image, the peers that were named, and whether to start what serves it here. Raises UserError."""
finder: Finder | None = None


def check(options: UpOptions) -> None:
    """Raises UserError for what cannot be a root."""
    if options.root is None or options.root == NONE:
        if options.persist:
            raise UserError("--persist without --root", "containers keep theirs: hostos container boot --persist NAME")
        return
    if not _IMAGE.fullmatch(options.root):
        raise UserError(f"not the hash of an image: {options.root[:80]!r}", "hostos image ls")
    if options.kernel is not None:
        raise UserError("--root and --kernel exclude each other", "the kernel of another maker mounts no image")


def wanted(options: UpOptions) -> bool:
    return options.root not in (None, NONE)


def arguments(options: UpOptions, scale: float) -> str:
    """Words of the kernel command line. `scale`: by how much deadlines are stretched."""
    words = [
        f"rdinit={FIRST_PROCESS}",
        f"hostos.root={options.root}",
        *(["hostos.persist=1"] if options.persist else []),
        *([f"hostos.deadline={60 * scale:g}"] if scale > 1 else []),
        # The image's fstab names disks that this machine hasn't got.
        "fstab=no",
        # Whoever holds the console of a virtual machine holds the machine, as in our own system.
        "systemd.set_credential=agetty.autologin:root",
    ]
    return " ".join(words)


def archive(options: UpOptions, *, own_address: bool, start: bool) -> dict[str, bytes]:
    """Files for the machine's archive: whom to ask, and the image's metadata if it is known here.

    `own_address`: the machine cannot reach this host's loopback; `start`: start what serves the image.
    Raises UserError.
    """
    assert options.root is not None
    source = finder(options.root, options.peers or (), start) if finder else Source(options.peers or ())
    peers = []
    for peer in source.peers:
        scheme, separator, rest = peer.rpartition("://")
        host, colon, port = rest.rpartition(":")
        if host in _LOOPBACK:
            if own_address:
                # The seed listens on the loopback, which only user networking leads to.
                continue
            host = HOST_FROM_GUEST
        peers.append(f"{scheme}{separator}{host}{colon}{port}")
    if not peers and (start or not source.metadata):
        raise UserError(
            f"nobody is known who has image {options.root[:16]}… and whom the machine can reach",
            "say who: --peer HOST:PORT (have the seed listen there: hostos seed start --listen ADDRESS)",
        )
    key = "hostos.gateway" if any("://" in peer for peer in peers) else "hostos.peer"
    files = {"root": "".join(f"{key}={peer}\n" for peer in peers).encode()}
    if source.metadata:
        files["image"] = source.metadata
    return files


def climb(watch: Watch, seconds: float, steps: Steps) -> None:
    """Wait until the machine says that the image is its root. Raises UserError: it says why not, or nothing
    for `seconds`."""
    give_up = time.monotonic() + seconds
    for name, said in (("image found", "metadata "), ("root mounted", "mounted ")):
        with steps.step(name):
            while not any(line.startswith((said, "mounted ")) for line in watch.heard):
                watch.check()
                failed = next((line for line in watch.heard if line.startswith("failed: ")), None)
                if failed:
                    reason, _, hint = failed.removeprefix("failed: ").partition(" (hint: ")
                    hint = hint.removesuffix(")")
                    raise watch.failed(f"the image could not become the machine's root: {reason}", hint)
                if time.monotonic() > give_up:
                    last = watch.heard[-1] if watch.heard else "nothing"
                    raise watch.failed(
                        f"the root was not mounted within {seconds:g} s; it last said: {last}",
                        "give it longer (HOSTOS_TIMEOUT_SCALE)",
                    )
                time.sleep(0.03)


def heard(line: str) -> str:
    """What the guest says about its root in a line of its console; "" if it is about something else."""
    match = _SAID.search(line)
    return match[1].strip() if match else ""
