"""A repository as an image: apt installs from it, checking the same signatures, with no network at all."""

from __future__ import annotations

import shutil
import subprocess

import pytest


@pytest.mark.skipif(shutil.which("tar2sqfs") is None, reason="no tar2sqfs here")
def test_a_snapshot_is_an_archive(cache, web, archive, trusted, make_client, tmp_path):
    client = make_client(cache)
    client.update()
    client.download("small", "large")
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


def test_nothing_known_yet(make_cache, upstream, web):
    cache = make_cache(upstream)
    cache.configure()
    done = cache.hostos("publish", web.url, "--name", "a", check=False)
    assert done.returncode == 2
    assert "nothing is known of" in done.stderr
