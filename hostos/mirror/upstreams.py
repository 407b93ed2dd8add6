"""The archives that are cached: which URLs, whose signatures. `mirror.toml` in the configuration directory.

[[apt]]
url = "http://deb.example.org/debian"
suites = ["bookworm", "bookworm-updates"]
components = ["main"]
signed_by = "/usr/share/keyrings/debian-archive-keyring.gpg"

[[pacman]]
repository = "core"
servers = ["https://arch.example.org/core/os/x86_64"]
keys = "/etc/pacman.d/gnupg"
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tomlkit

from hostos.errors import UserError, failure
from hostos.machine.files import write_atomic
from hostos.mirror.errors import RefusedError
from hostos.mirror.location import canonical
from hostos.mirror.signatures import Keys
from hostos.paths import config_dir, private_dir


@dataclass(frozen=True)
class Apt:
    """An apt archive, by one or more entries of sources.list. A suite that ends in `/` is a flat one."""

    url: str
    suites: tuple[str, ...]
    components: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    signed_by: str = ""
    sources: bool = False
    check_valid_until: bool = True
    check_date: bool = True

    @cached_property
    def base(self) -> str:
        """`host/path`, as in `location`."""
        scheme, _, rest = self.url.partition("://")
        return canonical(scheme, rest).rstrip("/")

    @property
    def keys(self) -> Keys:
        return Keys.parse(self.signed_by)

    def roots(self) -> list[str]:
        """Where its Release files lie, below `base`."""
        return [_root(suite) for suite in self.suites]


def _root(suite: str) -> str:
    """sources.list(5): a suite that ends in a slash is a path below the URL."""
    if not suite.endswith("/"):
        return f"dists/{suite}"
    return "/".join(part for part in suite.split("/") if part not in ("", "."))


@dataclass(frozen=True)
class Pacman:
    """A pacman repository. `servers`: URLs of its directory, in order; `keys`: pacman's GnuPG home;
    `signed_database`: the database has to be signed, too."""

    repository: str
    architecture: str
    servers: tuple[str, ...]
    keys: str = "/etc/pacman.d/gnupg"
    signed_database: bool = False

    @property
    def base(self) -> str:
        """Where the proxy has it."""
        return f"pacman/{self.repository}/{self.architecture}"


@dataclass(frozen=True)
class Upstreams:
    apt: tuple[Apt, ...] = ()
    pacman: tuple[Pacman, ...] = ()

    def find_apt(self, location: str) -> list[Apt]:
        """The entries of the archive that `location` is part of: those with the longest URL."""
        found = [each for each in self.apt if location.startswith(each.base + "/")]
        longest = max((len(each.base) for each in found), default=0)
        return [each for each in found if len(each.base) == longest]

    def keys_of(self, base: str) -> Keys:
        """By which the apt archive at `base` is checked, of all its entries together."""
        keys = [each.keys for each in self.apt if each.base == base]
        return Keys(
            tuple(dict.fromkeys(file for each in keys for file in each.files)),
            armored="\n".join(each.armored for each in keys if each.armored),
        )

    def find_pacman(self, location: str) -> Pacman | None:
        return next((each for each in self.pacman if location.startswith(each.base + "/")), None)

    def merged(self, more: Upstreams) -> Upstreams:
        """With the entries of `more` that aren't there; a pacman repository's servers are replaced."""
        known = set(self.apt)
        same = {replace(each, check_valid_until=True, check_date=True) for each in self.apt}
        apt = [
            each
            for each in more.apt
            if each not in known and replace(each, check_valid_until=True, check_date=True) not in same
        ]
        names = {each.base for each in more.pacman}
        kept = tuple(each for each in self.pacman if each.base not in names)
        return Upstreams((*self.apt, *apt), (*kept, *more.pacman))


def path() -> Path:
    return config_dir() / "mirror.toml"


def load(file: Path | None = None) -> Upstreams | None:
    """What the file says; None if there is none. Raises UserError naming file and entry."""
    file = file or path()
    try:
        content = tomllib.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(
            f"{file} can't be read: {error}", "mend it, or make it anew: hostos mirror import --replace"
        ) from None
    try:
        return Upstreams(
            tuple(_apt(entry) for entry in content.get("apt", [])),
            tuple(_pacman(entry) for entry in content.get("pacman", [])),
        )
    except (KeyError, TypeError, ValueError, RefusedError) as error:
        raise UserError(f"{file}: {error}", "docs/mirror.md shows what it may hold") from None


def _apt(entry: dict[str, Any]) -> Apt:
    unknown = set(entry) - set(Apt.__dataclass_fields__)
    if unknown:
        raise ValueError(f"[[apt]] has no {', '.join(sorted(unknown))}")
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    made = Apt(**plain)
    if not made.suites:
        raise ValueError(f"[[apt]] {made.url}: no suites")
    _split(made.url)
    made = replace(made, url=made.url.rstrip("/"))
    assert made.base
    assert made.keys is not None
    return made


def _pacman(entry: dict[str, Any]) -> Pacman:
    unknown = set(entry) - set(Pacman.__dataclass_fields__)
    if unknown:
        raise ValueError(f"[[pacman]] has no {', '.join(sorted(unknown))}")
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    made = Pacman(**plain)
    for server in made.servers:
        _split(server)
    return replace(made, servers=tuple(server.rstrip("/") for server in made.servers))


def _split(url: str) -> tuple[str, str]:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("http", "https"):
        raise ValueError(f"{url!r} is no http or https URL")
    return scheme, rest


def save(upstreams: Upstreams, file: Path | None = None) -> None:
    """Raises a failure if it can't be written."""
    file = file or path()
    document = tomlkit.document()
    document.add(tomlkit.comment("The archives that `hostos mirror` caches: docs/mirror.md. Yours to edit."))
    for name, entries in (("apt", upstreams.apt), ("pacman", upstreams.pacman)):
        tables = tomlkit.aot()
        for entry in entries:
            tables.append(_table(entry))
        if entries:
            document.add(name, tables)
    try:
        private_dir(file.parent)
        write_atomic(file, tomlkit.dumps(document).encode())
    except OSError as error:
        raise failure(f"{file} can't be written: {error.strerror}", "check its owner and mode") from None


def _table(entry: Apt | Pacman) -> Any:
    table = tomlkit.table()
    for name, field in entry.__dataclass_fields__.items():
        value = getattr(entry, name)
        if value == field.default:
            continue
        multiline = isinstance(value, str) and "\n" in value
        shown = list(value) if isinstance(value, tuple) else value
        table.add(name, tomlkit.string(value, multiline=True) if multiline else shown)
    return table


def describe(upstreams: Upstreams) -> list[str]:
    """One line for each archive, for people."""
    lines = [f"apt     {each.url}  {' '.join(each.suites)}" for each in upstreams.apt]
    lines += [f"pacman  {each.repository} {each.architecture}  {first(each.servers)}" for each in upstreams.pacman]
    return lines


def first(servers: Sequence[str]) -> str:
    more = f" and {len(servers) - 1} more" if len(servers) > 1 else ""
    return (servers[0] if servers else "no server") + more


def dedupe(entries: Iterable[Apt]) -> tuple[Apt, ...]:
    return tuple(dict.fromkeys(entries))
