"""The machine's own package sources as upstreams: apt's sources.list and pacman's repositories.

Formats: sources.list(5), pacman.conf(5).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from debian.deb822 import Deb822

from hostos.errors import UserError
from hostos.mirror.errors import RefusedError
from hostos.mirror.upstreams import Apt, Pacman, Upstreams, dedupe

APT = Path("/etc/apt")
_LINE = re.compile(r"(deb|deb-src)\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*(.*)")
_NO = {"no", "false", "0", "off", "without", "disable"}


@dataclass(frozen=True)
class Imported:
    """`notes`: what was left out and why."""

    upstreams: Upstreams
    notes: tuple[str, ...]


def import_all(apt: Path = APT) -> Imported:
    """What this machine's apt and pacman use. Raises nothing: what can't be read is noted."""
    notes: list[str] = []
    entries = dedupe(apt_entries(apt, notes))
    return Imported(Upstreams(entries, tuple(pacman_entries(notes))), tuple(notes))


def apt_entries(apt: Path, notes: list[str]) -> Iterator[Apt]:
    """The entries of `apt`/sources.list and sources.list.d; `notes` gets what was left out."""
    valid, date = _apt_settings() if apt == APT else (True, True)
    files = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]
    files += sorted((apt / "sources.list.d").glob("*.sources"))
    for file in files:
        try:
            text = file.read_text()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            notes.append(f"{file}: {error}")
            continue
        parse = _paragraphs if file.suffix == ".sources" else _lines
        for fields in parse(text):
            yield from _entries(fields, file, valid, date, notes)


def urls(text: str, *, deb822: bool) -> Iterator[str]:
    """Those of a sources.list, or of a file in the deb822 format, that are not switched off."""
    for fields in (_paragraphs if deb822 else _lines)(text):
        if fields.get("enabled", "yes").strip().lower() not in _NO:
            yield from fields.get("uris", "").split()


def _lines(text: str) -> Iterator[dict[str, str]]:
    for raw in text.splitlines():
        found = _LINE.fullmatch(raw.partition("#")[0].strip())
        if not found:
            continue
        kind, options, url, suite, components = found.groups()
        fields = {"types": kind, "uris": url, "suites": suite, "components": components}
        for option in (options or "").split():
            name, _, value = option.partition("=")
            known = {"arch": "architectures"}
            fields[known.get(name.lower(), name.lower())] = value.replace(",", " ")
        yield fields


def _paragraphs(text: str) -> Iterator[dict[str, str]]:
    # Comments may stand between the fields of a paragraph.
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for paragraph in Deb822.iter_paragraphs(plain, use_apt_pkg=False):
        yield {key.lower(): str(value) for key, value in paragraph.items()}


def _entries(fields: dict[str, str], file: Path, valid: bool, date: bool, notes: list[str]) -> Iterator[Apt]:
    if fields.get("enabled", "yes").strip().lower() in _NO:
        return
    if fields.get("trusted", "no").strip().lower() not in (_NO | {""}):
        notes.append(f"{file}: {fields.get('uris', '')} is marked trusted without a signature: not cached")
        return
    for url in fields.get("uris", "").split():
        if not re.match(r"https?://", url):
            notes.append(f"{file}: {url} is neither http nor https: not cached")
            continue
        try:
            entry = Apt(
                url.rstrip("/"),
                tuple(fields.get("suites", "").split()),
                tuple(fields.get("components", "").split()),
                tuple(fields.get("architectures", "").split()),
                fields.get("signed-by", "").strip("\n"),
                "deb-src" in fields.get("types", "deb").split(),
                valid and fields.get("check-valid-until", "yes").lower() not in _NO,
                date and fields.get("check-date", "yes").lower() not in _NO,
            )
            if entry.suites and entry.base and entry.keys is not None:
                yield entry
        except (UserError, RefusedError) as error:
            notes.append(f"{file}: {url}: {error}")


def _apt_settings() -> tuple[bool, bool]:
    """apt's own Acquire::Check-Valid-Until and Acquire::Check-Date."""
    if shutil.which("apt-config") is None:
        return True, True
    command = ["apt-config", "shell", "VALID", "Acquire::Check-Valid-Until/b", "DATE", "Acquire::Check-Date/b"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return "VALID='false'" not in output, "DATE='false'" not in output


def upstream_proxy() -> str:
    """The proxy that apt is configured with, for us to go on using; not ourselves."""
    if shutil.which("apt-config") is None:
        return ""
    command = ["apt-config", "shell", "PROXY", "Acquire::http::Proxy"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"PROXY='(http://[^']+)'", output)
    if not found or re.match(r"http://(127\.|localhost|\[::1\])", found[1]):
        return ""
    return found[1].rstrip("/")


def pacman_entries(notes: list[str], config: Path | None = None) -> Iterator[Pacman]:
    """The repositories of pacman.conf, as `pacman-conf` resolves it."""
    if shutil.which("pacman-conf") is None:
        return
    base = ["pacman-conf", *(["--config", str(config)] if config else [])]
    names = _ask([*base, "--repo-list"]).split()
    if not names:
        return
    keys = _ask([*base, "GPGDir"]).strip().rstrip("/") or "/etc/pacman.d/gnupg"
    default = _ask([*base, "SigLevel"]).split()
    architectures = _ask([*base, "Architecture"]).split() or [os.uname().machine]
    for name in names:
        servers = [
            server.rstrip("/")
            for server in _ask([*base, "--repo", name, "Server"]).split()
            if re.match(r"https?://", server) and not re.match(r"http://(127\.|\[::1\]|localhost)[^/]*/pacman/", server)
        ]
        level = _ask([*base, "--repo", name, "SigLevel"]).split() or default
        if "PackageNever" in level or "PackageOptional" in level:
            notes.append(f"pacman.conf: {name} need not be signed (SigLevel): cached only what is signed")
        if not servers:
            notes.append(f"pacman.conf: {name} has no http or https server: not cached")
            continue
        yield Pacman(name, architectures[0], tuple(servers), keys, "DatabaseRequired" in level)


def _ask(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
