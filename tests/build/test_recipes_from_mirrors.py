"""Images of Debian and Ubuntu from their mirrors: built, locked, built again to the same hash."""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import subprocess
import urllib.request
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


UBUNTU = """
name = "test/noble"
source-date-epoch = 1700000000
[base]
ubuntu = "noble"
key = "ubuntu.gpg"
[[step]]
packages = ["jq"]
[[step]]
run = ". /etc/os-release; echo $ID $VERSION_CODENAME > /etc/made-of; jq --version >> /etc/made-of"
"""


def ubuntu_keyring(place: Path) -> Path:
    """This host's, else the one in Ubuntu's own archive (which then vouches for itself)."""
    installed = Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg")
    if installed.exists():
        return installed
    command = ["mmdebstrap", "--simulate", "--verbose", "--mode=root", "--variant=extract", "--format=null", "noble"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    mirror = re.search(r"^(?:Get|Hit|Err|Ign):\d+ (\S+) noble InRelease", said.stdout + said.stderr, re.M)
    if not mirror:
        pytest.skip("mmdebstrap knows no mirror of Ubuntu")
    try:
        with urllib.request.urlopen(f"{mirror[1]}/dists/noble/main/binary-amd64/Packages.xz", timeout=60) as answer:
            index = lzma.decompress(answer.read()).decode()
        record = next(each for each in index.split("\n\n") if each.startswith("Package: ubuntu-keyring\n"))
        name = re.search(r"^Filename: (\S+)$", record, re.M)
        assert name
        with urllib.request.urlopen(f"{mirror[1]}/{name[1]}", timeout=60) as answer:
            (place / "keyring.deb").write_bytes(answer.read())
    except OSError as error:
        pytest.skip(f"the mirror of Ubuntu can't be reached: {error}")
    subprocess.run(["dpkg-deb", "-x", place / "keyring.deb", place / "keyring"], check=True)
    return place / "keyring" / installed.relative_to("/")


def test_an_ubuntu_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    keyring = ubuntu_keyring(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = Path("noble.toml")  # the key is found from where the recipe is, whatever the directory of the build
    recipe.write_text(UBUNTU)
    with pytest.raises(UserError, match=r"the keyring ubuntu\.gpg: No such file") as told:
        builder.build(recipe, "", Steps(), builder.Options())
    assert told.value.status == 2
    shutil.copy(keyring, "ubuntu.gpg")
    image = builder.build(recipe, "", Steps(), builder.Options()).image
    with ExitStack() as stack:
        made = read_image(Store(), image, stack, Steps()).root.find(b"etc/made-of")
        assert made
        assert made.entry.read(99).startswith(b"ubuntu noble\njq-1.")
    components = {each["name"]: each for each in json.loads(bill(image.hash, Steps()))["components"]}
    assert components["apt"]["purl"].startswith("pkg:deb/ubuntu/apt@")
    assert len(components["jq"]["hashes"][0]["content"]) == 64
    # Its signature counts: with another key nothing is taken, and the way out is said.
    shutil.copy("/usr/share/keyrings/debian-archive-keyring.gpg", "ubuntu.gpg")
    with pytest.raises(UserError, match="NO_PUBKEY") as told:
        builder.build(recipe, "", Steps(), builder.Options(fresh=True))
    assert "ubuntu-keyring" in told.value.hint
