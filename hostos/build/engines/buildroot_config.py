"""Buildroot's configuration: rendered, resolved by its own Kconfig, and checked that nothing was lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hostos.build import cache, kconfig
from hostos.build.engines.buildroot_source import Source
from hostos.build.engines.buildroot_toolchain import Toolchain
from hostos.build.profile import Option, Profile, Value
from hostos.build.render import render
from hostos.build.run import run
from hostos.errors import UserError

TEMPLATE = "buildroot.config.j2"
# Our BR2_GLOBAL_PATCH_DIR, in the output directory.
PATCHES = "hostos.patches"
# Symbols (without BR2_) that say where things are on the build machine: no part of what is built.
PLACES = (
    *("CCACHE", "DL_DIR", "GLOBAL_PATCH_DIR", "LINUX_KERNEL_CUSTOM_CONFIG_FILE", "PACKAGE_OVERRIDE_FILE"),
    *("PRIMARY_SITE", "TOOLCHAIN_EXTERNAL_PATH"),
)
EXTERNAL = Path(__file__).resolve().parents[3] / "buildroot-external"


@dataclass(frozen=True)
class Settings:
    """Where sources come from. `primary_site`: URL; `offline`: nothing but the primary site and
    `dl_dir`; `ccache`: directory, empty for none; `override_file`: Buildroot's BR2_PACKAGE_OVERRIDE_FILE."""

    dl_dir: Path
    primary_site: str = ""
    offline: bool = False
    override_file: Path | None = None
    ccache: str = ""


def defconfig(
    profile: Profile, toolchain: Toolchain, settings: Settings, kernel_version: str, kernel_config: Path, patches: Path
) -> str:
    """The rendered defconfig. `patches`: where the kernel's hash is (`buildroot_kernel.record_hash`).

    Raises `UserError` for a template or feature that is wrong.
    """
    return render(
        TEMPLATE,
        profile=profile,
        toolchain=toolchain,
        settings=settings,
        kernel_version=kernel_version,
        kernel_config=kernel_config,
        patches=patches,
    )


def digest(text: str) -> str:
    """SHA-256 of what the defconfig `text` asks for, wherever it is built and its sources are."""
    symbols = kconfig.parse_config(text)
    return cache.digest({symbol: value for symbol, value in symbols.items() if not symbol.startswith(PLACES)})


def preview(profile: Profile) -> str:
    """The defconfig as `invoke render` shows it: own toolchain, sources from upstream."""
    symbol = Option("TOOLCHAIN_BUILDROOT_CXX", True, "toolchain", Path(TEMPLATE))
    toolchain = Toolchain("internal", "internal", (symbol,))
    series = profile.buildroot["kernel_series"]
    return defconfig(profile, toolchain, Settings(Path("dl")), f"{series}.x", Path("linux.config"), Path(PATCHES))


def configure(source: Source, output: Path, text: str, profile: Profile, log: Path | None = None) -> dict[str, Value]:
    """Write `output/.config` from the defconfig `text` and return what Kconfig made of it.

    Raises `UserError` when a symbol of a feature or of the template did not survive, naming it and
    who asked.
    """
    output.mkdir(parents=True, exist_ok=True)
    asked = output / "hostos.defconfig"
    asked.write_text(text)
    run(make(source, output, "defconfig", f"BR2_DEFCONFIG={asked}"), log=log)
    got = kconfig.parse_config((output / ".config").read_text())
    check(text, profile, got)
    return got


def check(text: str, profile: Profile, got: dict[str, Value]) -> None:
    """Raise `UserError` unless everything the defconfig `text` asks for is in `got`."""
    wanted = profile.buildroot_options()
    known = {option.symbol for option in wanted}
    template = Path("configs") / TEMPLATE
    wanted += [
        Option(symbol, value, "the template", template)
        for symbol, value in kconfig.parse_config(text).items()
        if symbol not in known
    ]
    # Make variables of the external tree are written as they are; Kconfig keeps them so.
    kconfig.verify(wanted, got, "Buildroot's Kconfig")


def make(source: Source, output: Path, *words: str) -> list[str | Path]:
    """The command line of a Buildroot target, with our external tree."""
    return ["make", "-C", source.path, f"O={output}", f"BR2_EXTERNAL={EXTERNAL}", *words]


def check_paths(**paths: Path | None) -> None:
    """Raise `UserError` for a path that make cannot hold: Buildroot splits at spaces and colons."""
    for name, path in paths.items():
        if path is None:
            continue
        if bad := [character for character in " \t:#$'\"\\" if character in str(path)]:
            raise UserError(
                f"Buildroot cannot build in a path with {bad[0]!r} in it, "
                f"and the {name.replace('_', ' ')} has one: {path}",
                "move it, or move all of hostos's caches: HOSTOS_HOME=/some/plain/path invoke build …",
            )
