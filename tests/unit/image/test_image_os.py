"""OS builds under a hash: published, offered by a real seed, fetched by another home over BitTorrent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(
    not (shutil.which("tar2sqfs") and shutil.which("unsquashfs")), reason="squashfs tools are not installed"
)
Run = Callable[..., subprocess.CompletedProcess[str]]


def build(directory: Path, arch: str) -> Path:
    """An OS build whose files boot nothing, with right checksums."""
    kernel = "Image" if arch == "aarch64" else "bzImage"
    contents = {kernel: arch.encode() * 50_000, "initrd.gz": os.urandom(300_000)}
    (directory / "config").mkdir(parents=True)
    (directory / "config/linux.config").write_text("CONFIG_X=y\n")
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    files = {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in contents.items()}
    manifest = {
        "schema": 1, "kind": "hostos-os", "profile": "default", "arch": arch, "kernel_version": "6.12.1",
        "cmdline": "quiet", "min_memory_mib": 160, "files": files,
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Run]:
    yield runner(tmp_path / "a")
    runner(tmp_path / "a")("seed", "stop")


def runner(home: Path) -> Run:
    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from hostos.cli import main; main()", *map(str, words)],
            env={**os.environ, "HOSTOS_HOME": str(home), "PYTHONPATH": str(REPOSITORY)},
            cwd=home.parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


def address(seed: str) -> str:
    facts = json.loads(seed)
    return f"{facts['host']}:{facts['port']}"


def test_an_os_for_two_architectures_by_one_hash(publisher: Run, tmp_path: Path) -> None:
    builds = {arch: build(tmp_path / f"default-{arch}", arch) for arch in ("x86_64", "aarch64")}
    hashes = {}
    for arch, directory in builds.items():
        done = publisher("os", "publish", directory)
        assert done.returncode == 0, done.stderr
        hashes[arch] = done.stdout.strip()
    # Nothing but the content counts, neither its place nor its dates.
    moved = shutil.copytree(builds["aarch64"], tmp_path / "elsewhere")
    assert publisher("os", "publish", moved).stdout.strip() == hashes["aarch64"]
    index = publisher("image", "index", "os/default", *hashes.values()).stdout.strip()
    started = publisher("seed", "start", "--json")
    assert started.returncode == 0, started.stderr
    peer = address(started.stdout)

    other = runner(tmp_path / "b")
    for arch in builds:
        fetched = other("os", "fetch", index, "--peer", peer, "--arch", arch)
        assert fetched.returncode == 0, fetched.stderr
        place = Path(fetched.stdout.strip())
        assert place == tmp_path / "b/data/os" / f"default-{arch}"
        for file in builds[arch].rglob("*"):
            if file.is_file():
                assert (place / file.relative_to(builds[arch])).read_bytes() == file.read_bytes()
    # Again, over what is there; and by the hash of one.
    assert other("os", "fetch", hashes["aarch64"], "--peer", peer).returncode == 0
    listed = json.loads(other("os", "ls", "--json").stdout)
    assert [each["architecture"] for each in listed] == ["aarch64", "x86_64"]
    assert not [path for path in (tmp_path / "b/data/os").iterdir() if path.name.startswith(".")]


def test_what_is_no_os_is_not_installed(publisher: Run, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    shutil.copy(sys.executable, tree / "bin/sh")
    image = publisher("image", "publish", tree, "--name", "no-os").stdout.strip()
    peer = address(publisher("seed", "start", "--json").stdout)
    other = runner(tmp_path / "b")
    refused = other("os", "fetch", image, "--peer", peer)
    assert refused.returncode == 2
    assert "no-os is no OS build" in refused.stderr
    assert not list((tmp_path / "b/data/os").iterdir())
    asked = other("os", "fetch", image)
    assert (asked.returncode, "name a peer" in asked.stderr) == (2, True)
    nobody = other("os", "fetch", "ab" * 32, "--peer", peer, "--deadline", "2")
    assert nobody.returncode == 1
    assert "Traceback" not in nobody.stderr
