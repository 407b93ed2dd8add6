"""Profiles and features: what an OS is made of, as data.

A profile (`configs/profiles/NAME.toml`) lists features; a feature (`configs/features/NAME.toml`)
lists the kernel symbols, Buildroot symbols and Debian packages it needs. Both engines and the
kernel are driven by nothing else, so adding a feature touches one file.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostos.errors import UserError
from hostos.hostsystem import canonical

SCHEMA = 1
ARCHES = ("x86_64", "aarch64")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# The serial console of each: a 16550 (PC) and a PL011 (QEMU's and other hypervisors' "virt" machines).
CONSOLES = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}

Value = bool | int | str


@dataclass(frozen=True)
class Option:
    """A configuration symbol somebody asked for. `symbol` has no CONFIG_/BR2_ prefix; `feature` and
    `file` say who asked."""

    symbol: str
    value: Value
    feature: str
    file: Path


@dataclass(frozen=True)
class DebianPart:
    """What a feature takes from Debian.

    `keep` maps a package to the programs kept of it (its other programs are left out); `units` and
    `helpers` are the systemd units and the programs in /usr/lib/systemd that stay; `libraries` are
    kept though nothing links to them; `drop` are paths (shell patterns) never taken, `skip`
    dependencies not unpacked at all. `python`: the
    feature brings Python modules, which are shipped as byte code.
    """

    packages: tuple[str, ...] = ()
    keep: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    units: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    python: bool = False


@dataclass(frozen=True)
class Feature:
    """One feature file. `kernel` and `buildroot` are already those of the chosen architecture;
    `busybox` are the programs that BusyBox stands in for."""

    name: str
    description: str
    requires: tuple[str, ...]
    kernel: tuple[Option, ...]
    buildroot: tuple[Option, ...]
    debian: DebianPart
    busybox: tuple[str, ...]
    file: Path


@dataclass(frozen=True)
class Profile:
    """A profile with its features, in the profile's order. `cmdline`: the kernel command line the
    launcher starts with."""

    name: str
    arch: str
    description: str
    features: tuple[Feature, ...]
    cmdline: str
    debian: Mapping[str, str]
    buildroot: Mapping[str, str]
    file: Path

    @property
    def target(self) -> str:
        """The name of its directory in `dist/`."""
        return f"{self.name}-{self.arch}"

    def kernel_options(self) -> list[Option]:
        return _merged([option for feature in self.features for option in feature.kernel])

    def buildroot_options(self) -> list[Option]:
        return _merged([option for feature in self.features for option in feature.buildroot])


def load_profile(name: str, arch: str, configs: Path = CONFIGS) -> Profile:
    """Read a profile and its features.

    Raises `UserError` for an unknown profile, feature, architecture or key, a value of the wrong
    type, a missing requirement, or two features that want different values of one symbol.
    """
    arch = canonical(arch)
    if arch not in ARCHES:
        raise UserError(f"unknown architecture {arch!r}", f"one of: {', '.join(ARCHES)}")
    file = _find(configs / "profiles", name, "profile")
    table = _Table(file)
    features = tuple(_load_feature(each, arch, configs, file) for each in table.strings("features"))
    profile = Profile(
        name=name,
        arch=arch,
        description=table.string("description"),
        features=features,
        cmdline=f"console={CONSOLES[arch]} {table.string('cmdline')}".rstrip(),
        debian=table.string_table("debian"),
        buildroot=table.string_table("buildroot"),
        file=file,
    )
    table.finish()
    present = {feature.name for feature in features}
    for feature in features:
        if lacking := [each for each in feature.requires if each not in present]:
            raise UserError(
                f"{file}: feature {feature.name!r} needs {', '.join(lacking)}",
                f"add it to the profile's `features` ({feature.file} says why)",
            )
    profile.kernel_options()
    profile.buildroot_options()
    return profile


def _load_feature(name: str, arch: str, configs: Path, asked_by: Path) -> Feature:
    file = _find(configs / "features", name, "feature", asked_by)
    table = _Table(file)
    debian = table.sub("debian")
    keep = debian.raw("keep", {})
    if not isinstance(keep, dict) or not all(isinstance(names, list) for names in keep.values()):
        raise UserError(f"{file}: [debian.keep] maps a package to a list of programs")
    feature = Feature(
        name=name,
        description=table.string("description"),
        requires=table.strings("requires", required=False),
        kernel=_options(table, "kernel", arch, name, file),
        buildroot=_options(table, "buildroot", arch, name, file),
        debian=DebianPart(
            packages=debian.strings("packages", required=False),
            keep={package: tuple(names) for package, names in keep.items()},
            units=debian.strings("units", required=False),
            helpers=debian.strings("helpers", required=False),
            libraries=debian.strings("libraries", required=False),
            skip=debian.strings("skip", required=False),
            drop=debian.strings("drop", required=False),
            python=bool(debian.raw("python", False)),
        ),
        busybox=table.strings("busybox", required=False),
        file=file,
    )
    debian.finish()
    table.finish()
    return feature


def _options(table: _Table, section: str, arch: str, feature: str, file: Path) -> tuple[Option, ...]:
    values = dict(table.raw(section, {}))
    per_arch = {each: values.pop(each, {}) for each in ARCHES}
    found = []
    for symbol, value in {**values, **per_arch[arch]}.items():
        if not re.fullmatch(r"[A-Z0-9_a-z]+", symbol) or not isinstance(value, bool | int | str):
            raise UserError(
                f"{file}: [{section}] {symbol} = {value!r} is no configuration symbol",
                'SYMBOL = true | false | number | "text", without the CONFIG_ or BR2_ prefix',
            )
        if symbol.startswith(("CONFIG_", "BR2_")):
            raise UserError(f"{file}: [{section}] {symbol}", "leave out the CONFIG_ or BR2_ prefix")
        found.append(Option(symbol, value, feature, file))
    return tuple(found)


def _merged(options: list[Option]) -> list[Option]:
    by_symbol: dict[str, Option] = {}
    for option in options:
        first = by_symbol.setdefault(option.symbol, option)
        if first.value != option.value:
            raise UserError(
                f"{option.symbol} is wanted as {first.value!r} by {first.file}, as {option.value!r} by {option.file}",
                "make them agree",
            )
    return list(by_symbol.values())


def _find(directory: Path, name: str, kind: str, asked_by: Path | None = None) -> Path:
    file = directory / f"{name}.toml"
    if re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) and file.is_file():
        return file
    known = sorted(path.stem for path in directory.glob("*.toml"))
    close = difflib.get_close_matches(name, known, 1)
    where = f" (in {asked_by})" if asked_by else ""
    raise UserError(
        f"there is no {kind} {name!r}{where}",
        (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(known)}",
    )


class _Table:
    """A TOML table that reports unknown keys and wrong types with the file's name."""

    def __init__(self, file: Path, values: dict[str, Any] | None = None, where: str = "") -> None:
        self.file = file
        self.where = where
        if values is None:
            try:
                values = tomllib.loads(file.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{file}: {error}", "see docs/build.md for the format") from None
            if (schema := values.pop("schema", None)) != SCHEMA:
                raise UserError(f"{file}: schema is {schema!r}, this hostos reads {SCHEMA}")
        self.values = values
        self.used: set[str] = set()

    def raw(self, key: str, default: Any) -> Any:
        self.used.add(key)
        return self.values.get(key, default)

    def string(self, key: str) -> str:
        value = self.raw(key, None)
        if not isinstance(value, str):
            raise UserError(f"{self.file}: {self.where}{key} must be a text, not {value!r}")
        return value

    def strings(self, key: str, *, required: bool = True) -> tuple[str, ...]:
        value = self.raw(key, None if required else [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise UserError(f"{self.file}: {self.where}{key} must be a list of texts, not {value!r}")
        return tuple(value)

    def string_table(self, key: str) -> dict[str, str]:
        sub = self.sub(key)
        return {name: sub.string(name) for name in sub.values}

    def sub(self, key: str) -> _Table:
        value = self.raw(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.file}: {self.where}{key} must be a table, not {value!r}")
        return _Table(self.file, value, f"{key}.")

    def finish(self) -> None:
        if unknown := sorted(set(self.values) - self.used):
            close = difflib.get_close_matches(unknown[0], sorted(self.used), 1)
            raise UserError(
                f"{self.file}: unknown key {self.where}{unknown[0]}",
                f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(self.used))}",
            )
