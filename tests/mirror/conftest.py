"""A signed archive, its mirror, and caches, all real, on loopback or in network namespaces."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.archive import Archive, Keyring
from hostos.mirror.upstreams import Apt
from mirror.cache import AptClient, Cache
from mirror.server import Web

HERE = Path(__file__).parent
NEEDED = ("apt-get", "dpkg-deb", "gpg", "gpgv")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = [tool for tool in NEEDED if shutil.which(tool) is None]
    needs = pytest.mark.skipif(bool(lacking), reason=f"no {', '.join(lacking)} here")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.swarm)
            item.add_marker(needs)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short path, for sockets."""
    path = Path(f"/tmp/hm-{os.getpid()}-{random.getrandbits(24):06x}")
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def keyring() -> Iterator[Keyring]:
    path = Path(f"/tmp/hm-gpg-{os.getpid()}")
    made = Keyring(path)
    yield made
    made.close()
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def archive(tmp_path: Path, keyring: Keyring) -> Archive:
    """Three packages: small, of 300 kB, and of 5 MB."""
    made = Archive(tmp_path / "archive", keyring)
    made.root.mkdir()
    made.add("small", 5_000)
    made.add("middle", 300_000)
    made.add("large", 5_000_000)
    made.publish()
    return made


@pytest.fixture
def web(archive: Archive) -> Iterator[Web]:
    made = Web(archive.root)
    yield made
    made.close()


@pytest.fixture
def trusted(tmp_path: Path, keyring: Keyring) -> Path:
    return keyring.export(tmp_path / "trusted.gpg", "good", "expired")


MakeCache = Callable[..., Cache]


@pytest.fixture
def make_cache(short: Path) -> Iterator[MakeCache]:
    """Makes caches, not started; stops them at the end and looks at their logs."""
    made: list[Cache] = []

    def make(*apt: Apt, **fields: object) -> Cache:
        made.append(Cache(short / f"h{len(made)}", apt, **fields))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for cache in made:
        cache.stop()
        print(cache.log())
        assert "Traceback" not in cache.log()


@pytest.fixture
def upstream(web: Web, trusted: Path) -> Apt:
    return Apt(web.url, ("stable",), ("main",), ("amd64",), str(trusted))


@pytest.fixture
def cache(make_cache: MakeCache, upstream: Apt) -> Cache:
    """A cache of the archive, running."""
    return make_cache(upstream).start()


MakeClient = Callable[..., AptClient]


@pytest.fixture
def make_client(tmp_path: Path, web: Web, trusted: Path) -> MakeClient:
    """Makes an apt that has never fetched anything, behind a cache."""
    count = 0

    def make(cache: Cache, **fields: object) -> AptClient:
        nonlocal count
        count += 1
        line = f"deb [signed-by={trusted}] {web.url} stable main"
        fields = {"sources": [line], "proxy": cache.proxy, **fields}
        return AptClient(tmp_path / f"apt{count}", **fields)  # type: ignore[arg-type]

    return make
