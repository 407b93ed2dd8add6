"""Snapshots of repositories that a recipe takes its packages from, instead of from a mirror (docs/mirror.md)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from hostos.image import sandbox, unpacked
from hostos.image.layers import torrents
from hostos.image.recipe import Base
from hostos.image.sandbox import Ids
from hostos.image.store import Store
from hostos.mirror import pinned
from hostos.mirror.pinned import Pinned
from hostos.mirror.snapshot import APT_OPTIONS
from hostos.steps import Steps

MOUNTED = "/run/snapshot"
"""Where a step finds them, by number."""
TOLD = "/run/hostos"
"""The directory that a step shares with us."""
KEYRINGS = {
    "debian": "/usr/share/keyrings/debian-archive-keyring.gpg",
    "ubuntu": "/usr/share/keyrings/ubuntu-archive-keyring.gpg",
}
_CONFIG, _KEY = "sources.list", "archive-key"


@dataclass(frozen=True)
class Pins:
    """`hashes`: of the snapshots, by how the recipe names them; `trees`: theirs, unpacked for the sandbox."""

    base: Base
    hashes: dict[str, str]
    trees: tuple[Pinned, ...]

    @classmethod
    def of(cls, base: Base, locked: dict[str, str], store: Store, who: Ids, steps: Steps) -> Pins:
        """`locked`: what their names meant last time. Raises UserError if one can't be had, or is no snapshot."""
        hashes, trees = {}, []
        for text in base.snapshots:
            image = pinned.obtain(text, steps, store, locked=locked.get(text, ""))
            hashes[text] = image.hash
            torrent, layer = torrents(store, image)[-1]
            trees.append(Pinned.at(unpacked.unpacked(torrent, layer, who, steps), image))
        return cls(base, hashes, tuple(trees))

    @property
    def key(self) -> str:
        """The host's keyring of the archive; else what the package manager trusts anyway."""
        default = KEYRINGS.get(self.base.kind, "")
        return self.base.key or (default if Path(default).is_file() else "")

    def for_mmdebstrap(self) -> list[str]:
        options = f"[{APT_OPTIONS}{f' signed-by={self.key}' if self.key else ''}]"
        where = [f"copy:{tree.place}" for tree in self.trees]
        return pinned.apt_sources(self.trees, self.base.value, self.base.components, where, options)

    def for_image(self) -> list[str]:
        """Where the packages are in the world: sources.list of the image."""
        where = [tree.origin.url for tree in self.trees]
        return pinned.apt_sources(self.trees, self.base.value, self.base.components, where)

    def for_pacman(self) -> str:
        return pinned.pacman_sections(self.trees, [f"file://{tree.place}" for tree in self.trees])

    # --- in a step ---

    @property
    def step_options(self) -> list[str]:
        """With which a step's package manager is called."""
        if self.base.kind == "arch":
            return ["--config", f"{TOLD}/{_CONFIG}"]
        return ["-o", f"Dir::Etc::SourceList={TOLD}/{_CONFIG}", "-o", "Dir::Etc::SourceParts=/dev/null"]

    def tell(self, told: Path) -> None:
        """Write what these options name."""
        where = [f"file:{MOUNTED}/{number}" for number in range(len(self.trees))]
        if self.base.kind == "arch":
            level = "Never" if self.base.variant == "unsigned" else "Required DatabaseOptional"
            text = f"[options]\nArchitecture = auto\nSigLevel = {level}\n{pinned.pacman_sections(self.trees, where)}"
        else:
            signed = ""
            if self.key:
                copy = f"{_KEY}{Path(self.key).suffix}"
                shutil.copyfile(self.key, told / copy)
                signed = f" signed-by={TOLD}/{copy}"
            options = f"[{APT_OPTIONS}{signed}]"
            lines = pinned.apt_sources(self.trees, self.base.value, self.base.components, where, options)
            text = "\n".join(lines) + "\n"
        (told / _CONFIG).write_text(text)

    def mount(self, root: Path) -> None:
        """Put the trees where they are looked for, in the sandbox."""
        for number, tree in enumerate(self.trees):
            place = root / MOUNTED.lstrip("/") / str(number)
            place.mkdir(parents=True)
            sandbox.mount(str(tree.place), str(place), None, sandbox.MS_BIND)
