"""Recipes are read with care: every mistake is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.image import recipe_lock
from hostos.image.buildcache import Package
from hostos.image.recipe import lineage, load
from hostos.image.recipe_lock import Locked
from hostos.live.manifest import BootConfig

FAMILY = """
[type.Arch64]
name = "os/arch64"
[type.Arch64.base]
debian = "trixie"
packages = ["systemd"]

[type.NVidia]
from = "Arch64"
[[type.NVidia.step]]
packages = ["nvidia-driver"]

[type.Gaming]
from = "NVidia"
[[type.Gaming.step]]
run = ["one", "two"]
network = true
[[type.Gaming.step]]
copy = "site"
to = "/srv/"
mode = "0640"
[type.Gaming.boot]
command = ["play"]
env = {A = "1"}
ports = ["80", "53/udp"]
"""


def write(directory: Path, text: str, name: str = "r.toml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_types_inherit_from_each_other(tmp_path: Path) -> None:
    line = lineage(load(write(tmp_path, FAMILY), "Gaming"))
    assert [each.name for each in line] == ["os/arch64", "nvidia", "gaming"]
    assert line[0].base is not None
    assert line[0].base.packages == ("systemd",)
    gaming = line[-1]
    assert [(step.kind, step.value, step.line, step.network) for step in gaming.steps] == [
        ("run", ("one", "two"), 15, True),
        ("copy", ("site",), 18, False),
    ]
    assert gaming.steps[1].mode == 0o640
    assert line[1].steps[0].network
    boot = gaming.boot_config(BootConfig(("x",), (("B", "2"),)))
    assert boot.command == ("play",)
    assert boot.env == (("A", "1"), ("B", "2"))
    assert boot.ports == ("80/tcp", "53/udp")


def test_a_recipe_names_another_file(tmp_path: Path) -> None:
    write(tmp_path, FAMILY, "family.toml")
    child = write(tmp_path, 'name = "mine"\nfrom = "family.toml#NVidia"\n', "mine.toml")
    assert [each.name for each in lineage(load(child))] == ["os/arch64", "nvidia", "mine"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('from = "a"\nnmae = "b"\n', r"r\.toml:2: a recipe has no key 'nmae'"),
        ('from = "a"\n\n[[step]]\nrun = "x"\n[[step]]\nrun = "x"\ncommand = "y"\n', r":7: a step has no key 'command'"),
        ('from = "a"\n[boot]\nprivileged = true\n', r":3: boot has no key 'privileged'"),
        ('[base]\nscratch = true\nsnapshot = "x"\n', r":3: a snapshot stands for the mirror"),
        ('[base]\ndebian = "trixie"\nsnapshot = [1]\n', r":3: snapshot is not a text or a list of texts"),
        ('[base]\ndebian = "trixie"\nmirrors = "x"\n', r":3: base has no key 'mirrors'"),
        ('[base]\ndebian = "trixie"\nscratch = true\n', r":1: a base has one of"),
        ('from = "a"\n[base]\nscratch = true\n', r":1: a recipe has either"),
        ("name = 'x'\n", "either `from` or a"),
        ('from = "a"\n[[step]]\npackages = ["rm -rf"]\n', r":3: 'rm -rf' is not the name of a package"),
        ('from = "a"\n[[step]]\npackages = ["--help"]\n', "is not the name of a package"),
        ('from = "a"\n[[step]]\nrun = 3\n', r":3: run is not a text"),
        ('from = "a"\n[[step]]\nrun = "x"\nenv = {A = "b"}\n', r":2: a step has one of"),
        ('from = "a"\n[[step]]\ncopy = "x"\nto = "srv/../../etc"\n', r":4: a copy goes `to` an absolute path"),
        ('from = "a"\n[[step]]\ncopy = "x"\nto = "/x"\nmode = "rwx"\n', r":5: mode is octal"),
        ('from = "a"\n[[step]]\nrun = "x"\nto = "/x"\n', r":4: to belongs to a copy"),
        ('from = "a"\n[boot]\nports = ["x"]\n', "boot: 'x/tcp' is not a port"),
        ('from = "a"\n[boot]\nenv = {A = 1}\n', r":3: env is not a table of texts"),
        ('from = "a"\nname = "0123456789abcdef"\n', "reads like a hash"),
        ('from = "a"\nsource-date-epoch = "now"\n', r":2: source-date-epoch is not a number"),
        ("from = \n", r"r\.toml: Invalid value \(at line 1"),
        ('[type.A]\nfrom = "x"\n', "has several types: A"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        load(write(tmp_path, text))


def test_circles_and_missing_recipes(tmp_path: Path) -> None:
    circle = write(tmp_path, '[type.A]\nfrom = "B"\n[type.B]\nfrom = "A"\n')
    with pytest.raises(UserError, match=r"in a circle: r\.toml#A -> r\.toml#B -> r\.toml#A"):
        lineage(load(circle, "A"))
    own = write(tmp_path, 'from = "own.toml"\n', "own.toml")
    with pytest.raises(UserError, match="in a circle"):
        lineage(load(own))
    orphan = write(tmp_path, 'from = "gone.toml"\n', "orphan.toml")
    with pytest.raises(UserError, match=r"gone\.toml: No such file"):
        lineage(load(orphan))
    with pytest.raises(UserError, match=r"has no \[type\.C\]; it has: A, B"):
        load(circle, "C")
    with pytest.raises(UserError, match="No such file"):
        load(tmp_path / "none.toml")


def test_a_lock_is_read_as_it_was_written(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    assert recipe_lock.read(recipe) == {}
    lock = Locked(7, "a" * 64, "from", {"base": {"libc6": Package("2.41-1", "ab"), "apt": Package("3", "")}}, "t", "i")
    other = Locked(1, snapshots={"steve/core": "b" * 64})
    recipe_lock.write(recipe, {"": lock, "Other": other})
    assert recipe_lock.read(recipe) == {"": lock, "Other": other}
    # One package, one line.
    assert '"libc6": ["2.41-1", "ab"]' in recipe_lock.path_of(recipe).read_text()
    for damaged in ("{", "[]", '{"kind": "hostos-recipe-lock", "schema": 1, "recipes": {"": {}}}'):
        recipe_lock.path_of(recipe).write_text(damaged)
        with pytest.raises(UserError, match="lock") as told:
            recipe_lock.read(recipe)
        assert "--update" in told.value.hint
    recipe_lock.path_of(recipe).write_text('{"kind": "hostos-recipe-lock", "schema": 2, "recipes": {}}')
    with pytest.raises(UserError, match="schema 2"):
        recipe_lock.read(recipe)
