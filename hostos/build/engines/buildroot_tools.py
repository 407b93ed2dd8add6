"""What Buildroot itself offers, one command away: menuconfig, a source bundle, graphs, licences, the
bill of materials and the check for known vulnerabilities. Nothing of it is rewritten here."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hostos.build import cache, kconfig, render
from hostos.build.engines import buildroot_host, buildroot_kernel
from hostos.build.engines.buildroot import BuildrootEngine, Options, Prepared, check_sources, version_of
from hostos.build.engines.buildroot_progress import Progress, seconds_by_package
from hostos.build.profile import CONFIGS, Option, Profile, Value
from hostos.build.run import require, run
from hostos.errors import UserError, failure
from hostos.steps import Steps

GRAPHS = ("graph-size", "graph-build", "graph-depends")
# Where a menuconfig's changes go, to be moved into a feature of a better name.
CUSTOM = "custom"


def fill(profile: Profile, options: Options, directory: Path, steps: Steps) -> Path:
    """Fetch every source archive of `profile` into `directory`: with it as `--primary-site` and
    `--offline`, the OS can be built without a network.

    Raises `UserError` when an archive cannot be had, or is not the one that its hash names.
    """
    directory.mkdir(parents=True, exist_ok=True)
    engine = BuildrootEngine(replace(options, dl_dir=directory))
    source, toolchain = engine.tools(profile, steps)
    cache.root().mkdir(parents=True, exist_ok=True)
    # Its own output directory: in one that was built, everything counts as downloaded.
    with tempfile.TemporaryDirectory(prefix="sources-", dir=cache.root()) as place:
        with steps.step("configuration") as step:
            prepared = engine.prepare(profile, source, toolchain, Path(place) / "output")
            step.detail = f"{len(prepared.info)} packages"
        if options.offline:
            check_sources(prepared)
        with steps.step("sources") as step:
            engine.make(prepared, Progress(len(prepared.info), step.progress), "source")
            for lock in directory.rglob(".lock"):
                lock.unlink()
            check_sources(replace(prepared, settings=replace(prepared.settings, primary_site=f"file://{directory}")))
            size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
            step.detail = f"{size / 1e6:.0f} MB in {directory}"
    return directory


def menuconfig(profile: Profile, options: Options, which: str, steps: Steps) -> Path | None:
    """Edit Buildroot's or the kernel's ("linux") configuration in its own menu, and write what was
    changed, and only that, to the feature `custom`. Returns that file, None if nothing changed.

    Raises `UserError` without a terminal, or when the menu ends with an error.
    """
    if which not in ("buildroot", "linux"):
        raise UserError(f"there is no configuration {which!r}", "one of: linux, buildroot")
    if not sys.stdin.isatty():
        raise UserError("menuconfig needs a terminal", "run it in one, or write the feature file by hand")
    prepared = BuildrootEngine(options).configured(profile, steps)
    if which == "buildroot":
        config, target = prepared.output / ".config", "menuconfig"
    else:
        run(prepared.make("toolchain", "linux-patch"), log=prepared.log, env=buildroot_host.environment())
        written = buildroot_kernel.write_config(profile, prepared.source, prepared.output, prepared.log)
        config = buildroot_kernel.locate(prepared.source, prepared.output).path / ".config"
        shutil.copyfile(written, config)
        target = "linux-menuconfig"
    before = kconfig.parse_config(config.read_text())
    ended = subprocess.run(prepared.make(target), env=buildroot_host.full_environment(), check=False).returncode
    if ended != 0:
        raise failure(
            f"{target} ended with {ended}", "apt-get install libncurses-dev, if it said that curses are missing"
        )
    after = kconfig.parse_config(config.read_text())
    if which == "linux":
        changed = _minimal_kernel(profile, prepared, before, after)
    else:
        changed = minimal(before, after, _saved(prepared))
    if not changed:
        return None
    return write_feature(changed, "kernel" if which == "linux" else "buildroot", CONFIGS)


def _saved(prepared: Prepared) -> set[str]:
    """The symbols a minimal configuration needs to name, as `make savedefconfig` finds them."""
    saved = prepared.output / "hostos.saved.defconfig"
    run(prepared.make("savedefconfig", f"BR2_DEFCONFIG={saved}"), env=buildroot_host.environment())
    return set(kconfig.parse_config(saved.read_text()))


def _minimal_kernel(
    profile: Profile, prepared: Prepared, before: Mapping[str, Value], after: Mapping[str, Value]
) -> dict[str, Value]:
    """What of the kernel's configuration has to be named to come from `before` to `after`.

    What `savedefconfig` lists is not enough: in our kernels all is off that nobody asks for, also
    what is on by default. So the rest is found by resolving the fragment again.
    """
    tree = buildroot_kernel.locate(prepared.source, prepared.output)
    everything = minimal(before, after, before.keys() | after.keys())
    saved = kconfig.parse_config(buildroot_kernel.savedefconfig(profile, tree, prepared.log))
    changed = {symbol: value for symbol, value in everything.items() if symbol in saved or value is False}
    while True:
        chosen = [Option(symbol, value, CUSTOM, Path(CUSTOM)) for symbol, value in changed.items()]
        lines = [kconfig.format_option(option, "CONFIG_") for option in chosen]
        fragment = "\n".join([render.linux_config(profile), *lines, ""])
        text = buildroot_kernel.resolve(profile, tree, fragment, prepared.output, prepared.log)
        got = kconfig.parse_config(text)
        lost = {symbol: value for symbol, value in everything.items() if got.get(symbol, False) != value}
        if not lost.keys() - changed.keys():
            return dict(sorted(changed.items()))
        changed |= lost


def minimal(before: Mapping[str, Value], after: Mapping[str, Value], named: set[str]) -> dict[str, Value]:
    """What changed from `before` to `after`: of symbols that appeared or changed only those `named`
    by a minimal configuration (others follow from them), and those that were switched off."""
    changed: dict[str, Value] = {}
    for symbol, value in after.items():
        if before.get(symbol, False) != value and (symbol in named or value is False):
            changed[symbol] = value
    for symbol, value in before.items():
        if symbol not in after and value is not False and symbol in named:
            changed[symbol] = False
    return dict(sorted(changed.items()))


def write_feature(changed: Mapping[str, Value], table: str, configs: Path) -> Path:
    """Add `changed` to the [kernel] or [buildroot] table of the feature `custom`. What it says of
    other symbols, and its other tables, are kept. Raises `UserError` when the file is not TOML."""
    path = configs / "features" / f"{CUSTOM}.toml"
    text = path.read_text() if path.exists() else 'schema = 1\ndescription = "Options chosen in menuconfig"\n'
    try:
        earlier = tomllib.loads(text).get(table, {})
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}", "correct it, or move it away") from None
    kept, skipping = [], False
    for line in text.splitlines():
        if line.startswith("["):
            skipping = line.strip() == f"[{table}]"
        if not skipping:
            kept.append(line)
    lines = [f"{symbol} = {_toml(value)}" for symbol, value in sorted({**earlier, **changed}.items())]
    path.write_text("\n".join([*kept, "", f"[{table}]", *lines]).replace("\n\n\n", "\n\n") + "\n")
    return path


def _toml(value: Value) -> str:
    return json.dumps(value)


def graph(profile: Profile, options: Options, into: Path, steps: Steps) -> list[Path]:
    """Buildroot's pictures of what takes the space, what took the time and what depends on what, as
    SVG in `into`. Raises `UserError` when nothing was built yet or graphviz is missing."""
    require("dot")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the graphs need matplotlib", f"{sys.executable} -m pip install matplotlib")
    prepared = _built(profile, options, steps)
    env = {**buildroot_host.environment(), "BR2_GRAPH_OUT": "svg", "PATH": _path()}
    with steps.step("graphs"):
        run(prepared.make(*GRAPHS), env=env, log=prepared.log)
    return _copy(prepared.output / "graphs", into)


def legal_info(profile: Profile, options: Options, into: Path, steps: Steps) -> Path:
    """Licences, licence texts and the source archives of everything in the image, in `into`."""
    prepared = _built(profile, options, steps)
    with steps.step("legal-info") as step:
        command = prepared.make("legal-info", *own_licences(prepared))
        run(command, log=prepared.log, env=buildroot_host.environment(), on_line=step.progress)
    _copy(prepared.output / "legal-info", into)
    return into


def own_licences(prepared: Prepared) -> list[str]:
    """Make variables for packages whose source came by the override file.

    The hashes of licence texts which Buildroot records are those of its own versions, and so are the
    names: a package of another version has the texts it has.
    """
    custom = sorted(name for name, facts in prepared.info.items() if version_of(facts).endswith("-custom"))
    prefixes = {name.upper().replace("-", "_").replace(".", "_"): name for name in custom}
    asked = " ".join(f"{prefix}_LICENSE_FILES {prefix}_DIR" for prefix in prefixes)
    shown = run([*prepared.make("-s", "printvars"), f"VARS={asked}"], env=buildroot_host.environment()) if asked else ""
    values = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    words = []
    for prefix in prefixes:
        words.append(f"{prefix}_HASH_FILES=")
        files = values.get(f"{prefix}_LICENSE_FILES", "").split()
        directory = Path(values.get(f"{prefix}_DIR", ""))
        if directory.is_dir() and any(not (directory / file).is_file() for file in files):
            present = [file for file in files if (directory / file).is_file()]
            words.append(f"{prefix}_LICENSE_FILES={' '.join(present)}")
    return words


def sbom(profile: Profile, options: Options, steps: Steps) -> str:
    """Buildroot's own CycloneDX bill of materials, with CPE names and patches."""
    prepared = BuildrootEngine(options).configured(profile, steps)
    return _cyclonedx(prepared)


def cve(profile: Profile, options: Options, feed: Path, steps: Steps) -> str:
    """The bill of materials with the known vulnerabilities of every package, from the NVD feed in
    `feed` (a clone of the JSON feeds Buildroot's cve-check uses: CVE-<year>/CVE-<year>-<n>xx/CVE-….json).
    Nothing is fetched.

    Raises `UserError` when the feed is not there.
    """
    if not any(feed.glob("CVE-*")):
        raise UserError(
            f"{feed} holds no CVE feed (directories CVE-<year>)",
            f"git clone --depth 1 https://github.com/fkie-cad/nvd-json-data-feeds {feed}",
        )
    prepared = BuildrootEngine(options).configured(profile, steps)
    text = _cyclonedx(prepared)
    script = prepared.source.path / "support/scripts/cve-check"
    with steps.step("cve-check"), tempfile.TemporaryDirectory(prefix="hostos-nvd-") as place:
        # It looks into the directory `git` of what it is given, where it would have put its own clone.
        (Path(place) / "git").symlink_to(feed.resolve())
        return _filter([sys.executable, script, "--nvd-path", place, "--no-nvd-update"], text, prepared)


def unchecked(document: str) -> list[str]:
    """Components of a bill of materials whose version no vulnerability can be compared with: their
    source came by the override file, and nothing says which version it is."""
    components = json.loads(document).get("components", [])
    return sorted({each["name"] for each in components if each.get("cpe", "").split(":")[5:6] == ["custom"]})


def vulnerabilities(document: str) -> list[tuple[str, str, str]]:
    """(CVE, severity, package) of every vulnerability a checked bill of materials calls exploitable.
    Those Buildroot's packages name as ignored or patched have another state."""
    sbom_json = json.loads(document)
    names = {each.get("bom-ref"): each["name"] for each in sbom_json.get("components", [])}
    found = []
    for each in sbom_json.get("vulnerabilities", []):
        if each.get("analysis", {}).get("state") != "exploitable":
            continue
        severity = next((rating.get("severity", "") for rating in each.get("ratings", [])), "")
        found += [(each["id"], severity, names.get(hit["ref"], hit["ref"])) for hit in each.get("affects", [])]
    return sorted(found)


def times(profile: Profile, options: Options, steps: Steps) -> dict[str, float]:
    """Seconds each package took in the last build, slowest first."""
    prepared = _built(profile, options, steps)
    return seconds_by_package((prepared.output / "build/build-time.log").read_text())


def _built(profile: Profile, options: Options, steps: Steps) -> Prepared:
    prepared = BuildrootEngine(options).configured(profile, steps)
    if not (prepared.output / "images/rootfs.tar").exists():
        raise UserError(
            "nothing was built with these options yet", "invoke build --engine buildroot, with the same options"
        )
    return prepared


def _cyclonedx(prepared: Prepared) -> str:
    # It would fetch the list of SPDX identifiers; without one, licences keep Buildroot's names.
    schema = prepared.settings.dl_dir / "cyclonedx/spdx-1.6.schema.json"
    if prepared.settings.offline and not schema.exists():
        schema.parent.mkdir(parents=True, exist_ok=True)
        schema.write_text('{"enum": []}\n')
    show = run([*prepared.make("-s", "--no-print-directory", "show-info")], env=buildroot_host.environment())
    script = prepared.source.path / "utils/generate-cyclonedx"
    return _filter([sys.executable, script], show[show.index("{") :], prepared)


def _filter(command: list[str | Path], text: str, prepared: Prepared) -> str:
    env = {**buildroot_host.full_environment(), "BR2_DL_DIR": str(prepared.settings.dl_dir)}
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        hint = "with --offline it fetches nothing"
        if "No module named 'distutils'" in done.stderr:  # gone from Python 3.12; setuptools has it
            hint = f"{sys.executable} -m pip install setuptools"
        raise failure(f"{Path(command[1]).name} failed:\n{done.stderr[-1500:]}", hint)
    return done.stdout


def _path() -> str:
    # Buildroot's graph scripts need matplotlib, which the Python that runs this has.
    return f"{Path(sys.executable).parent}:{buildroot_host.environment()['PATH']}"


def _copy(source: Path, into: Path) -> list[Path]:
    into.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, into, dirs_exist_ok=True, symlinks=True)
    return sorted(Path(parent) / name for parent, _, names in os.walk(into) for name in names)
