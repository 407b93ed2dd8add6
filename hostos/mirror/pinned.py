"""Snapshots of repositories, found again and used: by hash, by the name of an image here, by somebody's signed
name (docs/names.md). `snapshot` makes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError
from hostos.image.download import download
from hostos.image.store import Store, StoredImage
from hostos.live.torrents import parse_image_reference
from hostos.mirror.snapshot import ORIGIN, Origin
from hostos.names.resolve import resolve
from hostos.steps import Steps


def obtain(text: str, steps: Steps, store: Store | None = None, *, locked: str = "") -> StoredImage:
    """The snapshot that `text` means (`locked`: meant, when it was pinned), in the store; fetched from those whom
    a signed name's record names, if need be. Raises UserError."""
    store = store or Store()
    peers: tuple[str, ...] = ()
    wanted = locked or text
    if not locked or store.find(locked) is None:
        found = resolve(text) if "/" in text else None
        if found is not None:
            steps.note(str(found))
            for warning in found.warnings:
                steps.warning(warning)
            peers, wanted = found.record.peers, locked or found.record.image
    stored = store.find(wanted)
    if stored is not None and not stored.missing:
        return stored
    try:
        reference = parse_image_reference(stored.hash if stored else wanted)
    except UserError:
        raise UserError(
            f"there is no snapshot {text[:80]!r} here", "hostos mirror publish makes one; hostos image ls shows them"
        ) from None
    if not (asked := (*peers, *reference.peers)):
        raise UserError(
            f"snapshot {reference.info_hash[:16]}… is not in this host's store, and nobody is known who has it",
            "give its magnet link, or the signed name of somebody who seeds it: hostos name add",
        )
    with store.incoming() as temporary:
        got = download(reference.info_hash, asked, temporary, steps, machine=os.uname().machine)
        made = store.add(got.bundle.manifest, list(zip(got.bundle.layers, got.layers, strict=True)))
    if made != reference.info_hash:
        # It has what no snapshot has: a trace, a bill of materials, images for several architectures.
        store.remove(made)
        raise UserError(
            f"image {got.bundle.manifest.name} is no snapshot of a repository", "hostos mirror publish makes one"
        )
    return store.get(made)


@dataclass(frozen=True)
class Pinned:
    """A snapshot's tree at `place`."""

    image: str
    place: Path
    origin: Origin

    @classmethod
    def at(cls, place: Path, image: StoredImage) -> Pinned:
        """Raises UserError for a tree that is no snapshot."""
        try:
            origin = Origin(**json.loads((place / ORIGIN).read_bytes()))
        except (OSError, ValueError, TypeError):
            raise UserError(
                f"image {image.name} is no snapshot of a repository", "hostos mirror publish makes one"
            ) from None
        return cls(image.hash, place, origin)

    def suites(self, suite: str) -> list[str]:
        """Those it has of a distribution: the suite, its updates, its security."""
        below = self.place / "dists"
        found = {str(path.parent.relative_to(below)) for name in ("InRelease", "Release") for path in below.rglob(name)}
        return sorted(each for each in found if each == suite or each.startswith(f"{suite}-"))


def apt_sources(
    pins: Sequence[Pinned], suite: str, components: Sequence[str], where: Sequence[str], options: str = ""
) -> list[str]:
    """Lines of sources.list for the suite; `where`: the URL of each snapshot. Raises UserError if none has it."""
    lines = list(_apt_lines(pins, suite, components, where, options))
    if not any(f" {suite} " in line for line in lines):
        names = ", ".join(pin.image[:16] for pin in pins)
        raise UserError(f"the snapshot {names} has no suite {suite}", "hostos mirror show SNAPSHOT lists what it has")
    return lines


def _apt_lines(
    pins: Sequence[Pinned], suite: str, components: Sequence[str], where: Sequence[str], options: str
) -> Iterator[str]:
    for pin, url in zip(pins, where, strict=True):
        if pin.origin.kind != "apt":
            raise UserError(f"the snapshot {pin.image[:16]} is one of pacman's", f"{suite} is installed by apt")
        for each in pin.suites(suite):
            yield f"deb {options}{' ' if options else ''}{url} {each} {' '.join(components)}"


def pacman_sections(pins: Sequence[Pinned], where: Sequence[str]) -> str:
    """Sections of pacman.conf. Raises UserError for a snapshot of apt's."""
    for pin in pins:
        if pin.origin.kind != "pacman":
            raise UserError(f"the snapshot {pin.image[:16]} is one of apt's", "Arch is installed by pacman")
    return "".join(f"[{pin.origin.repository}]\nServer = {url}\n" for pin, url in zip(pins, where, strict=True))
