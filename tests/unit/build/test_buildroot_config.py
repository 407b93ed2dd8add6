"""The rendered Buildroot configuration, also against the real Kconfig when a Buildroot tree is at hand.

HOSTOS_BUILDROOT_SOURCE=<directory> says where one is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.build import kconfig
from hostos.build.engines import buildroot_config, buildroot_source
from hostos.build.engines.buildroot_config import EXTERNAL, Settings
from hostos.build.engines.buildroot_source import Source
from hostos.build.profile import Option, load_profile
from hostos.build.render import show
from hostos.errors import UserError

PROFILES = ("default", "minimal")
ARCHES = ("x86_64", "aarch64")
Rendered = Callable[..., str]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", PROFILES)
def test_every_requested_symbol_is_rendered_once(rendered: Rendered, name: str, arch: str) -> None:
    profile = load_profile(name, arch)
    text = rendered(profile, Settings(Path("/dl")))
    got = kconfig.parse_config(text)
    for option in profile.buildroot_options():
        assert got[option.symbol] == option.value
    names = [
        line.partition("=")[0].removeprefix("# ").partition(" ")[0] for line in text.splitlines() if "BR2_" in line
    ]
    symbols = [each for each in names if each.startswith("BR2_")]
    assert len(symbols) == len(set(symbols))
    assert got[arch] is True


def test_sources_behind_a_firewall(rendered: Rendered) -> None:
    profile = load_profile("default", "x86_64")
    plain = kconfig.parse_config(rendered(profile, Settings(Path("/dl"))))
    assert "PRIMARY_SITE" not in plain
    assert plain["DOWNLOAD_FORCE_CHECK_HASHES"] is True
    settings = Settings(Path("/dl"), "file:///site", offline=True, override_file=Path("/o.mk"), ccache="/cc")
    closed = kconfig.parse_config(rendered(profile, settings))
    assert closed["PRIMARY_SITE"] == "file:///site"
    assert closed["PRIMARY_SITE_ONLY"] is True
    assert closed["PACKAGE_OVERRIDE_FILE"] == "/o.mk"
    assert closed["CCACHE_DIR"] == "/cc"


def test_the_digest_is_of_what_is_built_not_of_where(rendered: Rendered) -> None:
    profile = load_profile("default", "x86_64")
    here = rendered(profile, Settings(Path("/dl")), config=Path("/here/linux.config"))
    closed = Settings(Path("/other"), "file:///site", offline=True, override_file=Path("/o.mk"), ccache="/cc")
    there = rendered(profile, closed, config=Path("/a/longer/path/linux.config"))
    assert here != there
    assert buildroot_config.digest(here) == buildroot_config.digest(there)
    assert buildroot_config.digest(here) != buildroot_config.digest(here.replace("OPTIMIZE_S=y", "OPTIMIZE_2=y"))


def test_a_custom_kernel_says_how_new_its_headers_are(rendered: Rendered) -> None:
    """Without this symbol Buildroot drops systemd from the configuration without a word."""
    got = kconfig.parse_config(rendered(load_profile("default", "x86_64"), Settings(Path("/dl"))))
    assert got["PACKAGE_HOST_LINUX_HEADERS_CUSTOM_6_12"] is True


def test_a_lost_symbol_names_feature_and_file(rendered: Rendered) -> None:
    profile = load_profile("default", "x86_64")
    text = rendered(profile, Settings(Path("/dl")))
    got = kconfig.parse_config(text)
    del got["PACKAGE_SYSTEMD_NSPAWN"]
    with pytest.raises(UserError, match=r"PACKAGE_SYSTEMD_NSPAWN: wanted True.*containers\.toml"):
        buildroot_config.check(text, profile, got)


def test_a_lost_line_of_the_template_is_noticed_too(rendered: Rendered) -> None:
    profile = load_profile("default", "x86_64")
    text = rendered(profile, Settings(Path("/dl")))
    got = kconfig.parse_config(text) | {"REPRODUCIBLE": False}
    with pytest.raises(UserError, match=r"REPRODUCIBLE.*buildroot\.config\.j2"):
        buildroot_config.check(text, profile, got)


@pytest.mark.parametrize("bad", ["/with space/x", "/colon:/x", "/dollar$/x", "/hash#/x", "/tab\t/x"])
def test_paths_make_cannot_hold(bad: str) -> None:
    with pytest.raises(UserError, match="Buildroot cannot build in a path"):
        buildroot_config.check_paths(build_directory=Path(bad))


@given(st.text("abcdefghijklmnopqrstuvwxyzABC0123456789._-/+@,=", min_size=1))
def test_other_paths_are_fine(text: str) -> None:
    buildroot_config.check_paths(build_directory=Path(text), toolchain=None)


def test_render_shows_it() -> None:
    assert "BR2_PACKAGE_HOSTOS_LIVE=y" in show(load_profile("default", "x86_64"), "buildroot")
    assert "BR2_PACKAGE_HOSTOS_LIVE" not in show(load_profile("minimal", "x86_64"), "buildroot")


def test_a_new_feature_is_one_file(rendered: Rendered, tmp_path: Path) -> None:
    """docs/buildroot.md, "How to add a feature"."""
    configs = tmp_path / "configs"
    for directory in ("features", "profiles"):
        (configs / directory).mkdir(parents=True)
    (configs / "features/htop.toml").write_text(
        'schema = 1\ndescription = "A process viewer"\n[buildroot]\nPACKAGE_HTOP = true\n'
    )
    (configs / "profiles/mine.toml").write_text(
        'schema = 1\ndescription = "mine"\nfeatures = ["htop"]\ncmdline = ""\n[buildroot]\nkernel_series = "6.12"\n'
    )
    text = rendered(load_profile("mine", "x86_64", configs), Settings(Path("/dl")))
    assert "# --- htop: A process viewer\nBR2_PACKAGE_HTOP=y\n" in text


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", PROFILES)
def test_the_real_kconfig_keeps_every_symbol(
    buildroot: Source, rendered: Rendered, tmp_path: Path, name: str, arch: str
) -> None:
    profile = load_profile(name, arch)
    version = buildroot_source.kernel_version(buildroot, profile.buildroot["kernel_series"])
    settings = Settings(tmp_path / "dl", "file:///site", offline=True, ccache="/cc")
    text = rendered(profile, settings, version, tmp_path / "linux.config")
    got = buildroot_config.configure(buildroot, tmp_path / "output", text, profile)
    assert got["LINUX_KERNEL_VERSION"] == version
    assert got["PACKAGE_SYSTEMD"] is True


def test_the_real_kconfig_refuses_a_symbol_it_does_not_know(
    buildroot: Source, rendered: Rendered, tmp_path: Path
) -> None:
    profile = load_profile("minimal", "x86_64")
    ssh = next(feature for feature in profile.features if feature.name == "ssh")
    wrong = Option("PACKAGE_OPENSSH_TYPO", True, "ssh", ssh.file)
    features = (
        *(each for each in profile.features if each is not ssh),
        replace(ssh, buildroot=(*ssh.buildroot, wrong)),
    )
    changed = replace(profile, features=features)
    text = rendered(changed, Settings(tmp_path))
    with pytest.raises(UserError, match=r"PACKAGE_OPENSSH_TYPO: wanted True, got absent.*ssh\.toml"):
        buildroot_config.configure(buildroot, tmp_path / "output", text, changed)


def test_check_package_finds_nothing(buildroot: Source) -> None:
    files = sorted(path for path in EXTERNAL.rglob("*") if path.is_file())
    tried = []
    for python in (sys.executable, "/usr/bin/python3"):
        answer = subprocess.run(
            [python, buildroot.path / "utils/check-package", "-b", *files],
            capture_output=True,
            text=True,
            check=False,
            cwd=buildroot.path,
            env={**os.environ, "BR2_EXTERNAL": str(EXTERNAL)},
        )
        if "ModuleNotFoundError" not in answer.stderr:
            assert answer.returncode == 0, answer.stdout + answer.stderr
            return
        tried.append(answer.stderr.strip().splitlines()[-1])
    pytest.skip(f"check-package cannot run here ({'; '.join(tried)}): apt-get install python3-magic python3-flake8")
