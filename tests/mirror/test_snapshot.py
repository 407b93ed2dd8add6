"""A repository as an image: apt installs from it, checking the same signatures, with no network at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hostos.mirror.snapshot import APT_OPTIONS
from mirror.cache import AptClient, Cache

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("tar2sqfs", "unsquashfs"))), reason="no tar2sqfs and unsquashfs here"
)
OTHER = "127.0.0.9"


def program(cache: Cache, *words: str) -> str:
    command = [sys.executable, "-c", "from hostos.cli import main; main()", *words]
    done = subprocess.run(command, env=cache.env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@contextmanager
def serving(cache: Cache, *words: str) -> Iterator[str]:
    """The URL that a command of the cache's home serves."""
    command = [sys.executable, "-c", "from hostos.cli import main; main()", *words]
    with subprocess.Popen(command, env=cache.env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        url = ""
        for line in process.stderr:
            if found := re.search(r"serving .*(http://\S+)", line):
                url = found[1]
                break
        try:
            assert url
            yield url
        finally:
            process.terminate()
    assert process.returncode in (0, -15)


def filled(cache, make_client) -> None:
    """With two of the three packages."""
    client = make_client(cache)
    client.update()
    client.download("small", "large")


def test_a_snapshot_is_an_archive(cache, web, archive, trusted, make_client, tmp_path):
    filled(cache, make_client)
    first = cache.hostos("publish", web.url, "--name", "test/stable")
    assert "2 packages of 3" in first.stderr
    image = first.stdout.strip()
    # The same again, in the same state: the same hash.
    assert cache.hostos("publish", web.address, "--name", "test/stable").stdout.strip() == image
    layer = next((cache.home / "data/layers").glob("*/*.squashfs"))
    tree = tmp_path / "tree"
    subprocess.run(["unsquashfs", "-q", "-n", "-d", tree, layer], check=True, capture_output=True)
    listing = (tree / "CONTENTS").read_text().splitlines()
    assert len(listing) == 3
    web.faults.only, web.faults.down = ".*", True
    cache.stop()
    reader = make_client(cache, sources=[f"deb [signed-by={trusted}] file:{tree} stable main"], proxy="false")
    reader.update()
    shown = reader.run("--print-uris", "install", "small", "large").stdout
    assert f"file:{tree}/pool/main/l/large" in shown
    reader.download("small", "large")
    failed = cache.hostos("publish", "http://nowhere/x", "--name", "a", check=False)
    assert failed.returncode == 2
    assert "none of the cached repositories" in failed.stderr


def test_somebody_else_finds_it_by_its_signed_name(cache, make_cache, web, archive, trusted, make_client, tmp_path):
    """Two homes stand for two hosts; the second has nothing but a public key and an address."""
    filled(cache, make_client)
    refused = cache.hostos("publish", web.url, "--name", "test/stable", "--push", "stable", check=False)
    assert refused.returncode == 2
    assert "hostos name create stable" in refused.stderr
    assert not (cache.home / "data/images").exists()
    key = program(cache, "name", "create", "stable")
    program(cache, "seed", "start", "--listen", OTHER)
    try:
        seed = json.loads(program(cache, "seed", "status", "--json"))
        words = ("--push", "stable", "--peer", f"{OTHER}:{seed['port']}")
        done = cache.hostos("publish", web.url, "--name", "test/stable", *words)
        image = done.stdout.strip()
        assert f"me/stable is {image} (number 1)" in done.stderr
        other = make_cache()
        with serving(cache, "name", "serve", "--listen", f"{OTHER}:46880") as names:
            program(other, "name", "add", "steve", key, "--at", names)
            shown = other.hostos("show", "steve/stable")
    finally:
        program(cache, "seed", "stop")
    assert f"{image}: 2 of 3 files" in shown.stderr
    assert sorted(line.split("/")[-1] for line in shown.stdout.splitlines()) == [
        "large_1.0_amd64.deb",
        "small_1.0_amd64.deb",
    ]
    # From here on it is in the second one's store; nobody else is needed.
    web.faults.only, web.faults.down = ".*", True
    cache.stop()
    with serving(other, "mirror", "serve", "steve/stable", "--listen", "127.0.0.1:0") as url:
        with urllib.request.urlopen(f"{url}/") as page:
            assert b'href="/pool' in page.read()
        line = f"deb [signed-by={trusted}] {url} stable main"
        reader = AptClient(tmp_path / "reader", [line], "false")
        reader.update()
        reader.download("small", "large")
        assert reader.debs()["large_1.0_amd64.deb"] == archive.packages["large"].read_bytes()
        assert reader.download("middle", check=False).returncode != 0
        # The pool is no way out of the snapshot.
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{url}/../../../etc/passwd")
    rows = json.loads(other.hostos("show", "steve/stable", "--all", "--json").stdout)["files"]
    assert {row["path"].split("/")[-1]: row["held"] for row in rows} == {
        "large_1.0_amd64.deb": True, "middle_1.0_amd64.deb": False, "small_1.0_amd64.deb": True,
    }  # fmt: skip
    digest = hashlib.sha256(archive.packages["middle"].read_bytes()).hexdigest()
    assert digest in {row["sha256"] for row in rows}


@pytest.mark.skipif(os.geteuid() != 0, reason="runs apt in the image's tree: needs root")
def test_an_image_that_has_it_as_its_package_source(cache, web, archive, make_client, tmp_path):
    """Laid over a system: there apt has the snapshot, its key, and no other source."""
    system = tmp_path / "system"
    (system / "etc/apt").mkdir(parents=True)
    (system / "etc/apt/sources.list").write_text("deb http://nowhere.invalid/debian x main\n")
    (system / "bin").mkdir()
    shutil.copy("/bin/true", system / "bin/true")
    parent = program(cache, "image", "publish", str(system), "--name", "test/system")
    filled(cache, make_client)
    made = cache.hostos("publish", web.url, "--name", "test/installer", "--onto", "test/system").stdout.strip()
    shown = json.loads(program(cache, "image", "inspect", made, "--json"))
    assert parent in json.dumps(shown)
    tree = tmp_path / "tree"
    for number in (0, 1):
        torrent = (cache.home / f"data/images/{made}/layers/{number}.torrent").read_bytes()
        layer = next(
            path for path in (cache.home / "data/layers").glob("*/*.squashfs") if path.name.encode() in torrent
        )
        subprocess.run(["unsquashfs", "-f", "-q", "-n", "-d", tree, layer], check=True, capture_output=True)
    lines = (tree / "etc/apt/sources.list").read_text()
    options = f"{APT_OPTIONS} signed-by=/etc/apt/keyrings/snapshot.gpg"
    assert lines == f"deb [{options}] file:/srv/snapshot stable main\n"
    here = lines.replace("/srv", f"{tree}/srv").replace("/etc", f"{tree}/etc")
    reader = make_client(cache, sources=[here], proxy="false")
    reader.update()
    reader.download("small", "large")
    assert program(cache, "image", "publish", str(system), "--name", "test/system") == parent


def test_nothing_known_yet(make_cache, upstream, web):
    cache = make_cache(upstream)
    cache.configure()
    done = cache.hostos("publish", web.url, "--name", "a", check=False)
    assert done.returncode == 2
    assert "nothing is known of" in done.stderr


def test_what_is_no_snapshot(cache, tmp_path):
    (tmp_path / "tree/bin").mkdir(parents=True)
    shutil.copy("/bin/true", tmp_path / "tree/bin/true")
    program(cache, "image", "publish", str(tmp_path / "tree"), "--name", "test/tree")
    for words in (("show", "test/tree"), ("serve", "test/tree", "--listen", "127.0.0.1:0")):
        done = cache.hostos(*words, check=False)
        assert done.returncode == 2
        assert "no snapshot of a repository" in done.stderr
    for words in (("show", "test/none"), ("show", "0" * 64)):
        done = cache.hostos(*words, check=False)
        assert done.returncode == 2
        assert "hint" in done.stderr or "snapshot" in done.stderr
