"""Images built from recipes: through the cache by themselves, and from a snapshot alone, again and again.

The real distribution, from this machine's own mirror of it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandboxes import scratch

from hostos.build.debian_archive import find_mirror
from hostos.errors import UserError
from hostos.image import builder, recipe_lock, verifying
from hostos.mirror.upstreams import Apt
from hostos.quickstart import SUITE
from hostos.steps import Steps

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
TOOLS = ("mmdebstrap", "tar2sqfs", "sqfs2tar", "unsquashfs")
pytestmark = [
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}"),
    pytest.mark.skipif(not Path(KEYRING).exists(), reason="needs debian-archive-keyring"),
    pytest.mark.timeout(1800),
]
RECIPE = f"""
name = "test/{{name}}"
source-date-epoch = 1700000000
[base]
debian = "{SUITE}"
variant = "apt"
{{source}}
[[step]]
packages = ["hello"]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """(pytest's own directory has been made before.)"""
    with scratch(monkeypatch) as path:
        yield path


def packages(recipe: Path) -> dict[str, str]:
    """Name -> SHA-256 of everything that a recipe's lock has."""
    found = recipe_lock.read(recipe)[""].packages.values()
    return {name: package.sha256 for each in found for name, package in each.items()}


def test_through_the_cache_and_then_from_a_snapshot_of_it(place, make_cache, monkeypatch):
    try:
        mirror = find_mirror().main
    except UserError as error:
        pytest.skip(str(error))
    entry = Apt(mirror.replace("https://", "http://"), (SUITE,), ("main",), (), KEYRING)
    cache = make_cache(entry).start()
    monkeypatch.setenv("HOSTOS_HOME", str(cache.home))
    monkeypatch.setenv("HOSTOS_MIRROR", entry.url)
    first, second = place / "first.toml", place / "second.toml"
    first.write_text(RECIPE.format(name="first", source=""))
    made = builder.build(first, "", Steps(), builder.Options())
    # Nobody has told it of the cache; all it installed is there, of the base and of the step.
    wanted = packages(first)
    held = {path.name for path in cache.held()}
    assert "hello" in wanted
    assert len(wanted) > 30
    assert set(wanted.values()) <= held
    print(cache.stats()["archives"])

    snapshot = cache.hostos("publish", entry.url, "--name", "debian/today").stdout.strip()
    cache.stop()
    second.write_text(RECIPE.format(name="second", source='snapshot = "debian/today"'))
    monkeypatch.setenv("HOSTOS_MIRROR", "http://127.0.0.1:9/nothing")
    again = builder.build(second, "", Steps(), builder.Options())
    assert packages(second) == wanted
    assert recipe_lock.read(second)[""].snapshots == {"debian/today": snapshot}
    # It says where the packages are in the world, not where they lay here: the very same base.
    assert again.image.manifest.layers[0] == made.image.manifest.layers[0]
    # The name means something else tomorrow; what is locked is the hash.
    tree = place / "tree"
    (tree / "bin").mkdir(parents=True)
    shutil.copy("/bin/true", tree / "bin/true")
    subprocess.run(
        [*cache_command(), "image", "publish", str(tree), "--name", "debian/today"], env=cache.env, check=True
    )
    assert verifying.verify(second, "", Steps()) == again.image.hash
    with pytest.raises(UserError, match="is no snapshot of a repository"):
        builder.build(second, "", Steps(), builder.Options(update=True))
    # What was not in the cache is not in the snapshot.
    second.write_text(RECIPE.format(name="second", source=f'snapshot = "{snapshot}"').replace("hello", "nano"))
    with pytest.raises(UserError, match=r"packages nano failed[\s\S]*nano"):
        builder.build(second, "", Steps(), builder.Options())


def cache_command() -> list[str]:
    return [sys.executable, "-c", "from hostos.cli import main; main()"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('snapshot = "no/such"', "there is no snapshot 'no/such' here"),
        ('snapshot = "a"\nmirror = "http://x/"', "stands for the mirror"),
        (f'snapshot = "{"ab" * 32}"', "nobody is known who has it"),
    ],
)
def test_bad_ones(source, reason, place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "home"))
    recipe = place / "r.toml"
    recipe.write_text(RECIPE.format(name="x", source=source))
    with pytest.raises(UserError, match=reason) as caught:
        builder.build(recipe, "", Steps(), builder.Options())
    assert caught.value.status == 2
    assert not recipe_lock.path_of(recipe).exists()
