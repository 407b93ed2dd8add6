import shutil

import pytest

from hostos.build import profile as profiles
from hostos.build.profile import load_profile
from hostos.build.render import linux_config, render
from hostos.errors import UserError


@pytest.fixture
def configs(tmp_path):
    shutil.copytree(profiles.CONFIGS, tmp_path / "configs")
    return tmp_path / "configs"


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("name", ["default", "minimal"])
@pytest.mark.parametrize("arch", profiles.ARCHES)
def test_the_profiles_load(name, arch):
    profile = load_profile(name, arch)
    assert profile.target == f"{name}-{arch}"
    assert profile.kernel_options()


def test_what_a_feature_asks_for_reaches_the_kernel_config():
    text = linux_config(load_profile("default", "x86_64"))
    for line in (
        "CONFIG_FUSE_FS=y",
        "CONFIG_NR_CPUS=64",
        'CONFIG_LSM="landlock"',
        "# CONFIG_LOCALVERSION_AUTO is not set",
    ):
        assert line in text.splitlines()


def test_architectures_differ():
    assert "CONFIG_PVH=y" in linux_config(load_profile("default", "x86_64"))
    assert "CONFIG_PVH" not in linux_config(load_profile("default", "aarch64"))


def test_no_symbol_twice():
    lines = [line for line in linux_config(load_profile("default", "x86_64")).splitlines() if line.startswith("CONFIG")]
    assert len(lines) == len({line.partition("=")[0] for line in lines})


def test_every_requirement_is_met_by_the_shipped_profiles():
    load_profile("default", "x86_64")


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("profiles/default.toml", '"fuse",', '"fuze",', ["fuze", "did you mean 'fuse'"]),
        ("profiles/default.toml", '"fuse",', "", ["shares", "needs fuse"]),
        ("profiles/default.toml", "features", "featurez", ["features"]),
        ("profiles/default.toml", "schema = 1", "schema = 9", ["schema is 9"]),
        ("profiles/default.toml", "cmdline = ", "cmdline = 3 #", ["cmdline must be a text"]),
        ("features/fuse.toml", "FUSE_FS = true", "CONFIG_FUSE_FS = true", ["CONFIG_FUSE_FS", "prefix"]),
        ("features/fuse.toml", "FUSE_FS = true", "FUSE_FS = [1]", ["FUSE_FS"]),
        ("features/fuse.toml", "FUSE_FS = true", "SMP = false", ["SMP", "base.toml", "fuse.toml"]),
        ("features/fuse.toml", "packages", "packagez", ["packagez", "did you mean 'packages'"]),
        ("features/fuse.toml", "schema = 1", "schema = 1\n[[", ["fuse.toml"]),
    ],
)
def test_mistakes_are_named(configs, file, old, new, says):
    change(configs / file, old, new)
    with pytest.raises(UserError) as caught:
        load_profile("default", "x86_64", configs)
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["defualt", "../default", "", "Default"])
def test_an_unknown_profile_is_refused(name):
    with pytest.raises(UserError, match="there is no profile"):
        load_profile(name, "x86_64")


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match="riscv64"):
        load_profile("default", "riscv64")


def test_templates_may_not_use_what_is_undefined(configs, monkeypatch):
    monkeypatch.setattr(profiles, "CONFIGS", configs)
    (configs / "x.j2").write_text("{{ nothing }}")
    with pytest.raises(UserError, match="nothing"):
        render("x.j2")
    (configs / "x.j2").write_text("\n{% if %}")
    with pytest.raises(UserError, match="x.j2:2"):
        render("x.j2")
