"""Layers that build steps made, kept by a key of everything that went into them.

    images/steps/<key>.json          which layer it was, and what packages came with it
    images/layers/<layer hash>/      the layer's file and torrent

Anything here may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostos.errors import UserError
from hostos.live.torrents import Torrent, parse_layer_torrent
from hostos.paths import cache_dir

VERSION = 2
"""Of the code that makes layers from steps: raised when the same step would give another one."""


@dataclass(frozen=True)
class Package:
    """A package of a distribution as it was installed. `sha256`: of its archive."""

    version: str
    sha256: str = ""


Packages = dict[str, Package]


@dataclass(frozen=True)
class Made:
    """What a step made: a layer (None: it changed nothing), the packages it installed, the architecture."""

    layer: tuple[Torrent, Path] | None
    packages: Packages = field(default_factory=dict)
    architecture: str = ""


def key(*parts: Any) -> str:
    """Of JSON values."""
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()


class BuildCache:
    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_dir() / "images"
        self.logs = self.root / "logs"  # of the last build of each recipe
        for directory in (self.root / "steps", self.root / "layers", self.logs):
            directory.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Made | None:
        """What was made under this key, if it is still there and whole."""
        try:
            found = json.loads((self.root / "steps" / f"{name}.json").read_bytes())
            packages = {each: Package(**value) for each, value in found["packages"].items()}
            if found["layer"] is None:
                return Made(None, packages, found["architecture"])
            place = self.root / "layers" / found["layer"]
            torrent = parse_layer_torrent((place / "layer.torrent").read_bytes())
            path = place / torrent.name
            if torrent.info_hash != found["layer"] or path.stat().st_size != torrent.size:
                return None
            return Made((torrent, path), packages, found["architecture"])
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None

    def put(self, name: str, made: Made) -> Made:
        """Keep it; its file is moved here. The result's path is the new one."""
        layer = None
        if made.layer:
            torrent, path = made.layer
            place = self.root / "layers" / torrent.info_hash
            place.mkdir(exist_ok=True)
            shutil.move(path, place / torrent.name)
            _write(place / "layer.torrent", torrent.data)
            layer = (torrent, place / torrent.name)
        record = {
            "layer": layer[0].info_hash if layer else None,
            "packages": {each: vars(package) for each, package in sorted(made.packages.items())},
            "architecture": made.architecture,
        }
        _write(self.root / "steps" / f"{name}.json", json.dumps(record).encode())
        return Made(layer, made.packages, made.architecture)


def lent(path: Path, directory: Path, number: int) -> Path:
    """`path` under a name of its own in `directory`, which `Store.add` may move: a link, or else a copy."""
    target = directory / f"layer{number}"
    with suppress(OSError):
        os.link(path, target)
        return target
    shutil.copyfile(path, target)
    return target


def _write(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_bytes(data)
    new.replace(path)
