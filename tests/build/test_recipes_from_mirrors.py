"""A Debian image from its mirror: built, locked, built again to the same hash."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.image import builder, recipe_lock, verifying
from hostos.image.importing import bill
from hostos.image.layers import read_image
from hostos.image.store import Store
from hostos.steps import Steps

pytestmark = [
    pytest.mark.build,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="needs mmdebstrap"),
    pytest.mark.skipif(os.geteuid() != 0 and not shutil.which("newuidmap"), reason="needs newuidmap (uidmap)"),
]

RECIPE = """
name = "test/trixie"
source-date-epoch = 1700000000
[base]
debian = "trixie"
[[step]]
packages = ["jq"]
[[step]]
run = "useradd -m steve; jq --version > /etc/jq-version"
"""


def test_a_debian_image_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    recipe = tmp_path / "trixie.toml"
    recipe.write_text(RECIPE)
    image = builder.build(recipe, "", Steps(), builder.Options()).image
    assert [text.split()[0] for text in image.manifest.history] == ["base", "packages", "run"]
    packages = recipe_lock.read(recipe)[""].packages
    (base,) = (found for text, found in packages.items() if text.startswith("base debian trixie "))
    assert len(base) > 50
    assert "jq" in packages["packages jq"]
    assert all(len(package.sha256) == 64 for found in packages.values() for package in found.values())
    with ExitStack() as stack:
        tree = read_image(Store(), image, stack, Steps())
        version = tree.root.find(b"etc/jq-version")
        assert version
        assert version.entry.read(99).startswith(b"jq-1.")
        assert all(entry.mtime <= 1_700_000_000 for entry in tree.entries())
    components = {each["name"]: each for each in json.loads(bill(image.hash, Steps()))["components"]}
    assert components["jq"]["hashes"][0]["content"] == packages["packages jq"]["jq"].sha256
    assert verifying.verify(recipe, "", Steps()) == image.hash
    # What the mirror does not have any more is an error that names it, not another image.
    lock = recipe_lock.path_of(recipe)
    lock.write_text(lock.read_text().replace(packages["packages jq"]["jq"].sha256, "0" * 64))
    with pytest.raises(UserError, match="package jq is locked as .* the mirror has"):
        builder.build(recipe, "", Steps(), builder.Options(locked=True))
