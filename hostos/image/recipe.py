"""Recipes: what an image is built from, as TOML (docs/recipes.md). Reading them runs nothing."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hostos.errors import UserError
from hostos.live.manifest import BootConfig, check_name

MAX_RECIPE = 1 << 20

StepKind = Literal["packages", "run", "copy", "env", "user", "workdir"]
BaseKind = Literal["debian", "ubuntu", "arch", "scratch", "directory", "tar", "oci", "containerfile"]

_KEYS = ("name", "from", "base", "boot", "step", "trace", "architecture", "source-date-epoch")
_BASES = ("debian", "ubuntu", "arch", "scratch", "directory", "tar", "oci", "containerfile")
_BASE_KEYS = ("packages", "mirror", "snapshot", "components", "variant", "key", "tag")
_STEPS = ("packages", "run", "copy", "env", "user", "workdir")
_STEP_KEYS = ("network", "to", "owner", "mode")
_BOOT_KEYS = ("command", "env", "user", "workdir", "ports")
_PACKAGE = re.compile(r"[a-z0-9A-Z][a-zA-Z0-9+._:@-]*(=[A-Za-z0-9.+:~_-]+)?")


@dataclass(frozen=True)
class Step:
    """One step. `value`: package names, commands, paths to copy, pairs, or a word; `line`: where it is written."""

    kind: StepKind
    value: tuple[str, ...]
    line: int
    network: bool = False
    to: str = ""
    owner: str = "0:0"
    mode: int | None = None

    def __str__(self) -> str:
        text = "; ".join(self.value) if self.kind == "run" else " ".join(self.value)
        return f"{self.kind} {text}" + (f" -> {self.to}" if self.to else "")


@dataclass(frozen=True)
class Base:
    """Where the first layer comes from. `value`: the suite, or a path; `key`: keyring for the mirror;
    `snapshots`: of repositories, from which all packages come instead of from a mirror."""

    kind: BaseKind
    value: str
    packages: tuple[str, ...] = ()
    mirror: str = ""
    components: tuple[str, ...] = ("main",)
    variant: str = "minbase"
    key: str = ""
    tag: str = ""
    snapshots: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What it is in a lock file: everything that decides which packages it has."""
        words = ("base", self.kind, self.value, self.variant, *self.components, *self.packages, self.mirror)
        words = (*words, *self.snapshots)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read. `parent`: what `from` says; else `base` is there."""

    file: Path
    type: str
    name: str
    parent: str
    base: Base | None
    steps: tuple[Step, ...]
    boot: dict[str, Any] = field(default_factory=dict)
    trace: Path | None = None
    architecture: str | None = None
    source_date_epoch: int | None = None

    @property
    def label(self) -> str:
        return f"{self.file.name}#{self.type}" if self.type else self.file.name

    def boot_config(self, inherited: BootConfig) -> BootConfig:
        """What is said here, over what the parent says. Raises UserError."""
        env = {**dict(inherited.env), **self.boot.get("env", {})}
        try:
            return BootConfig(
                command=tuple(self.boot.get("command", inherited.command)),
                env=tuple(env.items()),
                user=self.boot.get("user", inherited.user),
                workdir=self.boot.get("workdir", inherited.workdir),
                ports=tuple(p if "/" in p else f"{p}/tcp" for p in map(str, self.boot.get("ports", inherited.ports))),
            )
        except UserError as error:
            raise UserError(f"{self.file}: boot: {error.message.replace('image manifest: ', '')}") from None


def load(file: Path, kind: str = "") -> Recipe:
    """The recipe in `file`; `kind`: which of its `[type.NAME]`. Raises UserError, with line numbers."""
    return _Reader(file).recipe(kind)


def lineage(recipe: Recipe) -> list[Recipe]:
    """The recipe and those it is made from, the eldest first. Raises UserError: cycles, missing recipes."""
    line = [recipe]
    while (parent := parent_recipe(line[-1])) is not None:
        if (parent.file.resolve(), parent.type) in {(each.file.resolve(), each.type) for each in line}:
            way = " -> ".join(each.label for each in [*line, parent])
            raise UserError(f"recipes are made from each other in a circle: {way}", "one of them needs another `from`")
        line.append(parent)
    return line[::-1]


def parent_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe that `from` names: a type of the same file, or FILE.toml[#TYPE]; None if it names an image."""
    if not recipe.parent:
        return None
    reader = _Reader(recipe.file)
    if recipe.parent in reader.types:
        return reader.recipe(recipe.parent)
    path, _, kind = recipe.parent.partition("#")
    if not path.endswith(".toml"):
        return None
    return load(recipe.file.parent / path, kind)


class _Reader:
    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            data = file.read_bytes()
            if len(data) > MAX_RECIPE:
                raise UserError(f"{file}: more than {MAX_RECIPE} bytes: not a recipe")
            self.text = data.decode()
            self.document = tomllib.loads(self.text)
        except OSError as error:
            raise UserError(f"recipe {file}: {error.strerror}", "hostos image build FILE.toml") from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UserError(f"{file}: {error}", "a recipe is TOML: docs/recipes.md") from None
        types = self.document.get("type", {})
        if not isinstance(types, dict) or not all(isinstance(each, dict) for each in types.values()):
            raise self.bad("type is not tables [type.NAME]", "type")
        self.types: dict[str, dict[str, Any]] = types

    def bad(self, why: str, word: str = "", after: int = 0) -> UserError:
        line = self.line(word, after) if word else after
        return UserError(f"{self.file}:{line}: {why}" if line else f"{self.file}: {why}", "see docs/recipes.md")

    def line(self, word: str, after: int = 0) -> int:
        """Where `word` is first a key or the name of a table, from line `after` on; 0 if nowhere."""
        quoted = rf'(?:"?{re.escape(word)}"?)'
        key = re.compile(rf"\s*(?:\[+[^\]]*\b)?{quoted}\s*(?:[=.\]])|.*[{{,]\s*{quoted}\s*=")
        lines = self.text.splitlines()
        return next((n for n, text in enumerate(lines, 1) if n >= after and key.match(text)), after)

    def recipe(self, kind: str) -> Recipe:
        table: dict[str, Any]
        if kind:
            if kind not in self.types:
                known = ", ".join(sorted(self.types)) or "none"
                raise UserError(f"{self.file} has no [type.{kind}]; it has: {known}", "give one of them with --type")
            table, after = self.types[kind], self.line(kind)
        else:
            table, after = {key: value for key, value in self.document.items() if key != "type"}, 1
            if not table and self.types:
                raise UserError(f"{self.file} has several types: {', '.join(self.types)}", "say which: --type NAME")
        self.known(table, _KEYS, "a recipe", after)
        parent = self.word(table, "from", after)
        base = self.base(table["base"], after) if "base" in table else None
        if bool(parent) == bool(base):
            raise self.bad("a recipe has either `from` or a [base]", "from" if parent else "", after)
        boot = table.get("boot", {})
        if not isinstance(boot, dict):
            raise self.bad("boot is not a table", "boot", after)
        self.known(boot, _BOOT_KEYS, "boot", self.line("boot", after))
        self.boot(boot, after)
        steps = table.get("step", [])
        if not isinstance(steps, list) or not all(isinstance(each, dict) for each in steps):
            raise self.bad("steps are written as [[step]]", "step", after)
        name = self.word(table, "name", after) or (kind.lower() if kind else self.file.stem)
        trace = self.word(table, "trace", after)
        epoch = table.get("source-date-epoch")
        if epoch is not None and (type(epoch) is not int or not 0 <= epoch < 1 << 32):
            raise self.bad("source-date-epoch is not a number of seconds", "source-date-epoch", after)
        found = Recipe(
            self.file,
            kind,
            check_name(name),
            parent,
            base,
            tuple(self.steps(steps, kind)),
            boot,
            self.file.parent / trace if trace else None,
            self.word(table, "architecture", after) or None,
            epoch,
        )
        found.boot_config(BootConfig())
        return found

    def known(self, table: dict[str, Any], keys: Iterable[str], where: str, after: int) -> None:
        for key in table:
            if key not in keys:
                raise self.bad(f"{where} has no key {key!r}; it has: {', '.join(keys)}", key, after)

    def word(self, table: dict[str, Any], key: str, after: int) -> str:
        value = table.get(key, "")
        if not isinstance(value, str) or "\0" in value or (key in table and not value):
            raise self.bad(f"{key} is not a text", key, after)
        return value

    def words(self, table: dict[str, Any], key: str, after: int) -> tuple[str, ...]:
        value = table.get(key, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(
            isinstance(each, str) and each and "\0" not in each for each in value
        ):
            raise self.bad(f"{key} is not a text or a list of texts", key, after)
        return tuple(value)

    def packages(self, table: dict[str, Any], after: int) -> tuple[str, ...]:
        names = self.words(table, "packages", after)
        for name in names:
            if not _PACKAGE.fullmatch(name):
                raise self.bad(f"{name!r} is not the name of a package", "packages", after)
        return names

    def boot(self, boot: dict[str, Any], after: int) -> None:
        for key in ("user", "workdir"):
            self.word(boot, key, after)
        self.words(boot, "command", after)
        if isinstance(boot.get("command"), str):
            raise self.bad("command is a list of words", "command", after)
        if not isinstance(boot.get("ports", []), list):
            raise self.bad("ports is not a list", "ports", after)
        self.pairs(boot, "env", after)

    def pairs(self, table: dict[str, Any], key: str, after: int) -> dict[str, str]:
        value = table.get(key, {})
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            raise self.bad(f"{key} is not a table of texts", key, after)
        return value

    def base(self, table: Any, after: int) -> Base:
        after = self.line("base", after)
        if not isinstance(table, dict):
            raise self.bad("base is not a table", "base", after)
        self.known(table, (*_BASES, *_BASE_KEYS), "base", after)
        kinds = [key for key in _BASES if key in table]
        if len(kinds) != 1:
            raise self.bad(f"a base has one of {', '.join(_BASES)}", "base", after)
        kind = kinds[0]
        value = table[kind]
        if kind in ("arch", "scratch"):
            if value is not True:
                raise self.bad(f"write {kind} = true", kind, after)
            value = ""
        elif not isinstance(value, str) or not value:
            raise self.bad(f"{kind} is not a text", kind, after)
        elif kind in ("directory", "tar", "oci", "containerfile"):
            value = str(self.file.parent / value)
        key = self.word(table, "key", after)
        snapshots = self.words(table, "snapshot", after)
        if snapshots and ("mirror" in table or kind not in ("debian", "ubuntu", "arch")):
            raise self.bad("a snapshot stands for the mirror of debian, ubuntu or arch", "snapshot", after)
        return Base(
            kind,  # type: ignore[arg-type]
            value,
            self.packages(table, after),
            self.word(table, "mirror", after),
            self.words(table, "components", after) or ("main",),
            self.word(table, "variant", after) or "minbase",
            str(self.file.parent / key) if key else "",
            self.word(table, "tag", after),
            snapshots,
        )

    def steps(self, tables: list[dict[str, Any]], kind: str) -> Iterable[Step]:
        header = re.compile(rf"\s*\[\[\s*{re.escape(f'type.{kind}.step' if kind else 'step')}\s*\]\]")
        lines = [n for n, text in enumerate(self.text.splitlines(), 1) if header.match(text)]
        lines += [0] * (len(tables) - len(lines))
        for table, line in zip(tables, lines, strict=False):
            self.known(table, (*_STEPS, *_STEP_KEYS), "a step", line)
            kinds = [key for key in _STEPS if key in table]
            if len(kinds) != 1:
                raise self.bad(f"a step has one of {', '.join(_STEPS)}", "", line)
            yield self.step(table, kinds[0], line)

    def step(self, table: dict[str, Any], kind: str, line: int) -> Step:
        network = table.get("network", kind == "packages")
        if type(network) is not bool:
            raise self.bad("network is true or false", "network", line)
        if extra := [key for key in ("to", "owner", "mode") if key in table and kind != "copy"]:
            raise self.bad(f"{extra[0]} belongs to a copy", extra[0], line)
        if kind == "packages":
            return Step("packages", self.packages(table, line), line, network)
        if kind == "env":
            pairs = self.pairs(table, "env", line)
            return Step("env", tuple(f"{key}={value}" for key, value in sorted(pairs.items())), line)
        if kind in ("user", "workdir"):
            return Step(kind, (self.word(table, kind, line),), line)  # type: ignore[arg-type]
        values = self.words(table, kind, line)
        if not values:
            raise self.bad(f"{kind} is empty", kind, line)
        if kind == "run":
            return Step("run", values, line, network)
        to, owner = self.word(table, "to", line), self.word(table, "owner", line) or "0:0"
        if not to.startswith("/") or ".." in to.split("/"):
            raise self.bad("a copy goes `to` an absolute path of the image", "to" if to else "copy", line)
        if not re.fullmatch(r"\d{1,9}:\d{1,9}", owner):
            raise self.bad("owner is UID:GID, in numbers", "owner", line)
        mode = table.get("mode")
        if mode is not None and not re.fullmatch(r"[0-7]{3,4}", str(mode)):
            raise self.bad('mode is octal, e.g. "0755"', "mode", line)
        return Step("copy", values, line, to=to, owner=owner, mode=int(str(mode), 8) if mode is not None else None)
