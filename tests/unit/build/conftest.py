"""Buildroot's configuration, rendered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hostos.build.engines import buildroot_config, buildroot_toolchain
from hostos.build.engines.buildroot_config import Settings
from hostos.build.profile import Profile
from hostos.steps import Step

Rendered = Callable[..., str]


@pytest.fixture
def quiet_step() -> Step:
    return Step("test", lambda event: None)


@pytest.fixture
def rendered(quiet_step: Step, tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """The defconfig of a profile with Buildroot's own toolchain."""
    patches = tmp_path_factory.mktemp("patches")  # Buildroot wants it to exist

    def render(
        profile: Profile, settings: Settings, version: str = "6.12.1", config: Path = Path("/linux.config")
    ) -> str:
        series = profile.buildroot["kernel_series"]
        toolchain = buildroot_toolchain.choose("internal", profile.arch, series, Path("unused"), quiet_step)
        return buildroot_config.defconfig(profile, toolchain, settings, version, config, patches)

    return render
