"""The real pacman against a repository that the test makes and signs with pacman's own tools."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.image import builder, recipe_lock, verifying
from hostos.image.layers import read_image
from hostos.image.store import Store
from hostos.mirror import importing
from hostos.mirror.upstreams import Pacman
from hostos.steps import Steps
from mirror.cache import Cache
from mirror.server import Web
from mirror.test_recipes import place  # noqa: F401

LACKING = [tool for tool in ("pacman", "repo-add", "pacman-key", "pacman-conf") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif(bool(LACKING), reason=f"no {', '.join(LACKING)} here"),
    pytest.mark.skipif(os.geteuid() != 0, reason="pacman installs as root only"),
]


@dataclass
class Repository:
    root: Path
    keyring: object
    home: Path
    """pacman's GnuPG home, as pacman-key makes it."""

    def add(self, name: str, size: int = 20_000, version: str = "1-1", key: str = "good") -> Path:
        info = f"pkgname = {name}\npkgver = {version}\npkgdesc = test\narch = x86_64\nsize = {size}\n"
        path = self.root / f"{name}-{version}-x86_64.pkg.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for inner, data in ((".PKGINFO", info.encode()), (f"opt/{name}", os.urandom(size))):
                entry = tarfile.TarInfo(inner)
                entry.size = len(data)
                archive.addfile(entry, BytesIO(data))
        self.sign(path, key)
        subprocess.run(["repo-add", "-q", self.root / "core.db.tar.gz", path], check=True, capture_output=True)
        return path

    def sign(self, path: Path, key: str) -> None:
        signature = path.with_name(f"{path.name}.sig")
        signature.unlink(missing_ok=True)
        self.keyring.gpg("--local-user", f"{key}@test", "--output", str(signature), "--detach-sign", str(path))


@pytest.fixture(scope="session")
def pacman_keys(keyring):
    """Made once: pacman-key makes a large key of its own."""
    home = Path(f"/tmp/hm-pacman-{os.getpid()}")
    home.mkdir(mode=0o755)
    key = keyring.export(home / "good.gpg", "good")
    listing = keyring.gpg("--with-colons", "--list-keys", "good@test").decode().splitlines()
    fingerprint = next(line.split(":")[9] for line in listing if line.startswith("fpr"))
    for words in (["--init"], ["--add", str(key)], ["--lsign-key", fingerprint]):
        done = subprocess.run(["pacman-key", "--gpgdir", home, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    # The agent would keep the directory.
    subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False, capture_output=True)
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def repository(tmp_path, keyring, short, pacman_keys) -> Repository:
    home = short / "pacman-keys"
    shutil.copytree(pacman_keys, home, ignore=lambda _, names: [name for name in names if name.startswith("S.")])
    made = Repository(tmp_path / "repository", keyring, home)
    made.root.mkdir()
    made.add("first")
    made.add("second", 3_000_000)
    return made


@pytest.fixture
def server(repository):
    made = Web(repository.root)
    yield made
    made.close()


@pytest.fixture
def cache(make_cache, repository, server) -> Cache:
    entry = Pacman("core", "x86_64", (server.url,), str(repository.home))
    return make_cache(pacman=(entry,)).start()


class Client:
    """pacman with a root directory of its own."""

    def __init__(self, root: Path, repository: Repository, servers: list[str]) -> None:
        self.root = root
        for part in ("var/lib/pacman", "var/cache/pacman/pkg", "etc"):
            (root / part).mkdir(parents=True)
        lines = "".join(f"Server = {server}\n" for server in servers)
        (root / "etc/pacman.conf").write_text(
            f"[options]\nArchitecture = x86_64\nSigLevel = Required DatabaseOptional\nGPGDir = {repository.home}\n"
            f"DisableDownloadTimeout\n[core]\n{lines}"
        )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [
            "pacman", "--noconfirm", "--root", self.root, "--config", self.root / "etc/pacman.conf",
            "--cachedir", self.root / "var/cache/pacman/pkg", "--noscriptlet", *words,
        ]  # fmt: skip
        env = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env)

    def installs(self, *names: str) -> None:
        done = self.run("-Sy", *names)
        assert done.returncode == 0, done.stdout + done.stderr
        assert all((self.root / "opt" / name).exists() for name in names)


def test_pacman_installs_through_the_cache(cache, repository, server, tmp_path, make_cache):
    url = f"{cache.proxy}/pacman/core/x86_64"
    Client(tmp_path / "one", repository, [url]).installs("first", "second")
    sent = server.sent(r"\.pkg\.tar\.gz$")
    assert sent == sum(path.stat().st_size for path in repository.root.glob("*.pkg.tar.gz"))
    Client(tmp_path / "two", repository, [url]).installs("first", "second")
    assert server.sent(r"\.pkg\.tar\.gz$") == sent
    assert cache.stats()["archives"]["pacman/core/x86_64"]["hits"] >= 2
    # Offline, with all that is needed.
    cache.stop()
    cache.start(offline=True)
    Client(tmp_path / "three", repository, [f"{cache.proxy}/pacman/core/x86_64"]).installs("second")


def test_packages_of_a_peer_the_database_of_the_server(cache, repository, server, tmp_path, make_cache):
    cache.stop()
    cache.start(share="127.0.0.1:0")
    Client(tmp_path / "one", repository, [f"{cache.proxy}/pacman/core/x86_64"]).installs("first", "second")
    before = server.sent(r"\.pkg\.tar\.gz$")
    databases = len(server.asked(r"core\.db$"))
    second = make_cache(pacman=cache.pacman).start(peers=(cache.info["share"],))
    Client(tmp_path / "two", repository, [f"{second.proxy}/pacman/core/x86_64"]).installs("first", "second")
    assert server.sent(r"\.pkg\.tar\.gz$") == before
    assert len(server.asked(r"core\.db$")) > databases
    assert second.stats()["archives"]["pacman/core/x86_64"]["from_peers"] > 3_000_000


@pytest.mark.parametrize("fault", ["unknown key", "no signature", "signature of another", "other bytes"])
def test_refused(fault, cache, repository, server):
    path = repository.root / "first-1-1-x86_64.pkg.tar.gz"
    reason = {
        "unknown key": "signed by an unknown key",
        "no signature": "is not signed",
        "signature of another": "has a bad signature",
        "other bytes": "has not the SHA-256 that is signed",
    }[fault]
    signature = path.with_name(f"{path.name}.sig")
    if fault == "unknown key":
        repository.sign(path, "other")
    elif fault == "no signature":
        signature.unlink()
    elif fault == "signature of another":
        shutil.copy(repository.root / "second-1-1-x86_64.pkg.tar.gz.sig", signature)
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    answer = cache.get(f"/pacman/core/x86_64/{path.name}")
    assert answer.status == 502 or not answer.whole
    assert reason in cache.log()
    assert cache.held() == []
    assert cache.get(f"/pacman/core/x86_64/{path.name}.sig").status == 502


def test_a_key_that_is_known_and_not_trusted(cache, repository, keyring, short):
    other = keyring.export(short / "other.gpg", "other")
    subprocess.run(["pacman-key", "--gpgdir", repository.home, "--add", other], check=True, capture_output=True)
    subprocess.run(["gpgconf", "--homedir", repository.home, "--kill", "all"], check=False, capture_output=True)
    path = repository.root / "first-1-1-x86_64.pkg.tar.gz"
    repository.sign(path, "other")
    assert cache.get(f"/pacman/core/x86_64/{path.name}").status == 502
    assert "by a key that pacman does not trust" in cache.log()


def test_what_is_not_in_the_database(cache, repository):
    (repository.root / "stray-1-1-x86_64.pkg.tar.gz").write_bytes(b"stray")
    answer = cache.get("/pacman/core/x86_64/stray-1-1-x86_64.pkg.tar.gz")
    assert answer.status == 404
    assert "does not name" in answer.reason
    for path in ("/pacman/core/x86_64/../../x", "/pacman/core/aarch64/core.db", "/pacman/extra/x86_64/extra.db"):
        assert cache.get(path).status in (400, 403)


def test_a_database_that_has_to_be_signed(make_cache, repository, server):
    entry = Pacman("core", "x86_64", (server.url,), str(repository.home), signed_database=True)
    cache = make_cache(pacman=(entry,)).start()
    assert cache.get("/pacman/core/x86_64/core.db").status == 502
    repository.sign(repository.root / "core.db", "good")
    answer = cache.get("/pacman/core/x86_64/core.db")
    assert answer.status == 200
    assert answer.body == (repository.root / "core.db").read_bytes()
    good = answer.body
    repository.add("third")
    repository.sign(repository.root / "core.db", "other")
    time.sleep(2.1)
    refused = cache.get("/pacman/core/x86_64/core.db")
    assert refused.status == 502
    assert "unknown key" in refused.reason
    assert (cache.store / "pacman/databases/core-x86_64-core.db").read_bytes() == good


def test_import_of_repositories(repository, tmp_path):
    client = Client(
        tmp_path / "one", repository, ["https://m.example/$repo/os/$arch", "http://127.0.0.1:3143/pacman/x"]
    )
    notes: list[str] = []
    found = list(importing.pacman_entries(notes, client.root / "etc/pacman.conf"))
    assert found == [Pacman("core", "x86_64", ("https://m.example/core/os/x86_64",), str(repository.home))]
    assert notes == []


def test_a_recipe_builds_from_a_snapshot(cache, repository, server, place, tmp_path, monkeypatch):  # noqa: F811
    """By pacman, of what the cache has of the repository, with the signatures checked, and nobody asked."""
    Client(tmp_path / "one", repository, [f"{cache.proxy}/pacman/core/x86_64"]).installs("first")
    done = cache.hostos("publish", "core", "--name", "arch/core")
    assert "1 packages of 2" in done.stderr
    cache.stop()
    server.faults.only, server.faults.down = ".*", True
    asked = len(server.log)
    monkeypatch.setenv("HOSTOS_HOME", str(cache.home))
    recipe = place / "r.toml"
    text = (
        'name = "test/arch"\n[base]\narch = true\nvariant = "unsigned"\nsnapshot = "arch/core"\npackages = ["first"]\n'
    )
    recipe.write_text(text)
    made = builder.build(recipe, "", Steps(), builder.Options())
    with ExitStack() as stack:
        paths = {entry.path for entry in read_image(Store(), made.image, stack, Steps()).entries()}
    assert b"opt/first" in paths
    assert recipe_lock.read(recipe)[""].snapshots == {"arch/core": done.stdout.strip()}
    assert verifying.verify(recipe, "", Steps()) == made.image.hash
    recipe.write_text(text.replace('"first"', '"second"'))
    with pytest.raises(UserError, match="building the base arch failed"):
        builder.build(recipe, "", Steps(), builder.Options())
    recipe.write_text(text.replace("arch = true", 'debian = "stable"'))
    with pytest.raises(UserError, match="is one of pacman's"):
        builder.build(recipe, "", Steps(), builder.Options())
    assert len(server.log) == asked
