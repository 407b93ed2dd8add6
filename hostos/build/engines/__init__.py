"""The engines: each makes the kernel and the root tree of a profile, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hostos.build.profile import Profile
from hostos.build.tree import Tree
from hostos.errors import UserError
from hostos.steps import Steps

if TYPE_CHECKING:
    from hostos.build.engines.buildroot import Options


@dataclass(frozen=True)
class Component:
    """A package that went into the result, for the manifest and the bill of materials.
    `origin`: "debian" or "buildroot"; `licence`: SPDX expression, empty if unknown."""

    name: str
    version: str
    origin: str
    source: str = ""
    sha256: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Built:
    """What an engine made. `image`: bzImage or Image; `vmlinux`: the ELF beside it; `tree`: the root
    before the overlay; `configs`: file name -> text, kept in the OS's config/ directory;
    `provenance`: facts for the manifest (commits, compiler…). `compile_python` turns the `.py` files
    of a tree into byte code of the guest's Python (None: the guest has no Python)."""

    kernel_version: str
    image: Path
    vmlinux: Path
    tree: Tree
    components: tuple[Component, ...]
    configs: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    compile_python: Callable[[Tree], None] | None = None


class Engine(Protocol):
    """Makes kernel and root tree. Raises `UserError` for anything foreseeable."""

    @property
    def name(self) -> str: ...

    def build(self, profile: Profile, steps: Steps) -> Built: ...


ENGINES = ("debian", "buildroot")


def choose(name: str, *, update: bool = False, locked: bool = False, buildroot: Options | None = None) -> Engine:
    """The engine of that name; `buildroot` are the options only that one has. Raises `UserError` for
    an unknown name."""
    if name == "debian":
        from hostos.build.engines.debian import DebianEngine

        return DebianEngine(update=update, locked=locked)
    if name == "buildroot":
        from hostos.build.engines.buildroot import BuildrootEngine, Options

        return BuildrootEngine(buildroot or Options())
    raise UserError(f"unknown engine {name!r}", f"one of: {', '.join(ENGINES)}")
