"""The way of builds to this host's package cache, where it runs and has the archive (docs/mirror.md)."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from hostos.build.debian_archive import find_mirror
from hostos.image.overlay import Tree
from hostos.image.recipe import Base
from hostos.mirror.control import proxy_for
from hostos.mirror.importing import urls

MAX_SOURCES = 1 << 20


def mirror_of(base: Base) -> str:
    """The recipe's, else this host's of Debian; for Ubuntu "", for which mmdebstrap has a default of its own."""
    return base.mirror or (find_mirror().main if base.kind == "debian" else "")


def for_base(base: Base) -> dict[str, str]:
    """As an environment: mmdebstrap would write options of apt's into the image."""
    mirror = "" if base.kind == "arch" else mirror_of(base)
    proxy = proxy_for(mirror) if mirror else ""
    return {"http_proxy": proxy} if proxy else {}


def for_apt(tree: Tree) -> list[str]:
    """Options of apt's, for the hosts of an image's sources whose archives are all in the cache."""
    proxies: dict[str, set[str | None]] = {}
    for url in _sources(tree):
        if url.startswith("http://"):
            proxies.setdefault(urlsplit(url).hostname or "", set()).add(proxy_for(url))
    return [f"-oAcquire::http::Proxy::{host}={next(iter(found))}" for host, found in proxies.items() if all(found)]


def _sources(tree: Tree) -> Iterator[str]:
    for entry in tree.entries():
        path = entry.path.decode(errors="replace")
        if path != "etc/apt/sources.list" and not path.startswith("etc/apt/sources.list.d/"):
            continue
        if path.endswith((".list", ".sources")) and entry.open is not None and entry.size <= MAX_SOURCES:
            yield from urls(entry.read(MAX_SOURCES).decode(errors="replace"), deb822=path.endswith(".sources"))
