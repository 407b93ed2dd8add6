"""The Buildroot engine: the whole OS from source (docs/buildroot.md).

Same profiles, features, overlay and result as the Debian engine. Buildroot does what it does best,
fetching, patching, cross-compiling and tracking packages; this module gives it a configuration and
takes kernel and root tree out of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostos.build import bytecode, cache, elf, kconfig, load_order
from hostos.build import tree as trees
from hostos.build.engines import (
    Built,
    Component,
    buildroot_config,
    buildroot_host,
    buildroot_kernel,
    buildroot_plan,
    buildroot_source,
    buildroot_toolchain,
    buildroot_tree,
)
from hostos.build.engines.buildroot_config import EXTERNAL, Settings, make
from hostos.build.engines.buildroot_progress import Progress
from hostos.build.engines.buildroot_source import Source
from hostos.build.engines.buildroot_toolchain import Toolchain
from hostos.build.kernel import IMAGE
from hostos.build.profile import Profile, Value
from hostos.build.render import linux_config
from hostos.build.run import run
from hostos.build.tree import Tree
from hostos.errors import UserError, failure
from hostos.paths import cache_dir
from hostos.steps import Step, Steps

# Symbols (without BR2_) whose change makes every object file stale.
_GLOBAL = ("TOOLCHAIN_", "GCC_", "OPTIMIZE_", "x86_64", "aarch64", "REPRODUCIBLE", "PACKAGE_HOST_LINUX_HEADERS")


@dataclass(frozen=True)
class Options:
    """What `invoke build --engine buildroot` can be told. `source`, `toolchain`: see
    `buildroot_source.obtain` and `buildroot_toolchain.choose`; `primary_site`: directory or URL;
    `jobs`: 0 for one per CPU; `ccache`: use Buildroot's compiler cache."""

    source: str | None = None
    toolchain: str = buildroot_toolchain.INTERNAL
    primary_site: str = ""
    offline: bool = False
    dl_dir: Path | None = None
    override_file: Path | None = None
    ccache: bool = False
    jobs: int = 0


@dataclass(frozen=True)
class Prepared:
    """A configured output directory. `info`: Buildroot's show-info, package -> facts."""

    source: Source
    toolchain: Toolchain
    settings: Settings
    output: Path
    kernel_version: str
    defconfig: str
    config: Mapping[str, Value]
    info: Mapping[str, Any]
    log: Path

    def make(self, *words: str) -> list[str | Path]:
        return make(self.source, self.output, *words)


@dataclass(frozen=True)
class BuildrootEngine:
    options: Options = field(default_factory=Options)
    name: str = "buildroot"

    def build(self, profile: Profile, steps: Steps) -> Built:
        source, toolchain = self.tools(profile, steps)
        key = self._key(profile, source, toolchain)
        output = self._output(profile, source, toolchain)
        if found := find_result(key, output):
            steps.note("Buildroot's result is in the cache: nothing it depends on has changed")
            return self._built(profile, source, toolchain, found, output)
        with ExitStack() as turn:
            with steps.step("configuration") as step:
                turn.enter_context(cache.alone(output.name, step))
                prepared = self.prepare(profile, source, toolchain)
                step.detail = f"{len(prepared.info)} packages"
            # Whoever was waited for may have made it.
            if find_result(key, output) is None:
                if self.options.offline:
                    check_sources(prepared)
                with steps.step("packages") as step:
                    self._compile(profile, prepared, step)
                with steps.step("root file system") as step:
                    self._collect(profile, prepared, key, step)
        result = cache.find("buildroot", key)
        assert result is not None
        return self._built(profile, source, toolchain, result, output)

    def tools(self, profile: Profile, steps: Steps) -> tuple[Source, Toolchain]:
        """What to build with. Raises `UserError` when the machine or an option is not fit for it."""
        # Before anything is fetched.
        settings = self.settings()
        buildroot_config.check_paths(
            cache=cache.root(),
            download_directory=settings.dl_dir,
            project=EXTERNAL,
            override_file=settings.override_file,
        )
        buildroot_host.check(profile.arch)
        with steps.step("Buildroot source") as step:
            source = buildroot_source.obtain(self.options.source, step)
            step.detail = source.provenance
        with steps.step("toolchain") as step:
            series = profile.buildroot["kernel_series"]
            toolchain = buildroot_toolchain.choose(self.options.toolchain, profile.arch, series, source.path, step)
            step.detail = toolchain.kind
        return source, toolchain

    def configured(self, profile: Profile, steps: Steps) -> Prepared:
        """The output directory of `profile`, configured and verified, ready for `make`."""
        source, toolchain = self.tools(profile, Steps())
        with (
            steps.step("configuration") as step,
            cache.alone(self._output(profile, source, toolchain).name, step),
        ):
            prepared = self.prepare(profile, source, toolchain)
            step.detail = f"{len(prepared.info)} packages"
        return prepared

    def settings(self) -> Settings:
        """Where sources come from. Raises `UserError` for a path that is not there."""
        options = self.options
        site = options.primary_site
        if site and "://" not in site:
            directory = Path(site).expanduser().resolve()
            if not directory.is_dir():
                raise UserError(
                    f"--primary-site {site}: there is no such directory", "a directory with source archives, or a URL"
                )
            site = f"file://{directory}"
        if options.override_file is not None and not options.override_file.is_file():
            raise UserError(
                f"--override-file {options.override_file}: there is no such file",
                "a make file with lines <PACKAGE>_OVERRIDE_SRCDIR = <directory>",
            )
        dl_dir = (options.dl_dir or cache_dir() / "buildroot-dl").expanduser().resolve()
        return Settings(
            dl_dir=dl_dir,
            # BR2_PRIMARY_SITE_ONLY means nothing without a primary site: the download directory is one.
            primary_site=site or (f"file://{dl_dir}" if options.offline else ""),
            offline=options.offline,
            override_file=options.override_file.resolve() if options.override_file else None,
            ccache=str(cache_dir() / "buildroot-ccache") if options.ccache else "",
        )

    def prepare(self, profile: Profile, source: Source, toolchain: Toolchain, output: Path | None = None) -> Prepared:
        """Configure the output directory (another one than the profile's: `output`) and verify what
        Kconfig made of it."""
        settings = self.settings()
        if output is None:
            output = self._output(profile, source, toolchain)
            buildroot_host.check_disk(output, toolchain.kind, (output / "build").is_dir())
        buildroot_config.check_paths(Buildroot_source=source.path, toolchain=toolchain.path)
        settings.dl_dir.mkdir(parents=True, exist_ok=True)
        log = output / "hostos.log"
        version = buildroot_source.kernel_version(source, profile.buildroot["kernel_series"])
        patches = buildroot_kernel.record_hash(source, output, version)
        kernel_config = output / buildroot_kernel.CONFIG
        text = buildroot_config.defconfig(profile, toolchain, settings, version, kernel_config, patches)
        before = _state(output)
        config = buildroot_config.configure(source, output, text, profile, log)
        info = show_info(source, output)
        prepared = Prepared(source, toolchain, settings, output, version, text, config, info, log)
        if before is not None:
            self._make_stale(prepared, before)
        return prepared

    def _make_stale(self, prepared: Prepared, state: Mapping[str, Any]) -> None:
        """Forget what a changed configuration affects; resumable: the state is written afterwards."""
        now = external_files()
        touched = {
            file for file in now.keys() | state["external"].keys() if now.get(file) != state["external"].get(file)
        }
        plan = buildroot_plan.plan(state["info"], prepared.info, state["config"], prepared.config, touched)
        targets = [f"{name}-dirclean" for name in plan.rebuild]
        targets += [f"{name}-clean-for-reconfigure" for name in plan.reconfigure]
        if targets:
            run(prepared.make(*targets), log=prepared.log, env=buildroot_host.environment())
        if plan.refill:
            # Each package is installed again from its build directory.
            run(["rm", "-rf", prepared.output / "target"])
            for stamp in (prepared.output / "build").glob("*/.stamp_target_installed"):
                stamp.unlink()
        _write_state(prepared)

    def _compile(self, profile: Profile, prepared: Prepared, step: Step) -> None:
        if not (prepared.output / STATE).exists():
            _write_state(prepared)
        done = finished_packages(prepared.output)
        progress = Progress(len(prepared.info), step.progress, len(done))
        # Toolchain first: the kernel's Kconfig asks the compiler what it can do.
        self.make(prepared, progress, "toolchain", "linux-patch")
        config = prepared.output / buildroot_kernel.CONFIG
        before = config.read_text() if config.exists() else None
        step.progress("kernel configuration")
        buildroot_kernel.write_config(profile, prepared.source, prepared.output, prepared.log)
        if before is not None and before != config.read_text():
            self.make(prepared, progress, "linux-reconfigure")
        self.make(prepared, progress, "all")
        step.detail = f"{len(prepared.info)} packages"

    def make(self, prepared: Prepared, progress: Progress, *targets: str) -> None:
        """Run Buildroot's `targets`. Raises `UserError` (status 1) that says what was wrong with a
        source, or shows the failed package's last lines and how to build just that one again."""
        jobs = self.options.jobs or len(os.sched_getaffinity(0))
        try:
            run(
                prepared.make(*targets, f"BR2_JLEVEL={jobs}"),
                log=prepared.log,
                env=buildroot_host.environment(),
                on_line=progress.feed,
            )
        except UserError as error:
            if explained := progress.explain():
                raise failure(*explained) from None
            again = " ".join(str(word) for word in prepared.make(f"{progress.package}-rebuild"))
            raise failure(
                f"{progress.package or 'Buildroot'} failed while {progress.activity or 'starting'}:\n"
                + error.message.partition("\n")[2],
                f"whole log: {prepared.log}\n        that package again: {again}\n"
                "        or the same command again: it goes on there",
            ) from None

    def _collect(self, profile: Profile, prepared: Prepared, key: str, step: Step) -> None:
        links = next((prepared.output / "build").glob("busybox-*/busybox.links"), None)
        if links is None:
            raise failure("Buildroot built no BusyBox", "add PACKAGE_BUSYBOX = true to a feature's [buildroot] table")
        tree = buildroot_tree.collect(prepared.output / "images/rootfs.tar", profile, links.read_text())
        step.detail = f"{tree.size() / 1e6:.1f} MB"
        with cache.create("buildroot", key) as result:
            version = buildroot_kernel.take(profile, prepared.source, prepared.output, result, prepared.log)
            (result / "tree.pickle").write_bytes(pickle.dumps(tree.entries))
            facts = {
                "kernel_version": version,
                "python": any(path.startswith("usr/bin/python3.") for path in tree.entries),
                "components": [
                    [name, version_of(package), package.get("licenses") or ""]
                    for name, package in sorted(prepared.info.items())
                    if package.get("type") == "target" and not package.get("virtual")
                ],
            }
            (result / "facts.json").write_text(json.dumps(facts))
            (result / "buildroot.config").write_text((prepared.output / ".config").read_text())
            (result / "buildroot.defconfig").write_text(prepared.defconfig)

    def _built(self, profile: Profile, source: Source, toolchain: Toolchain, result: Path, output: Path) -> Built:
        facts = json.loads((result / "facts.json").read_text())
        names = ("buildroot.defconfig", "buildroot.config", "linux.config")
        configs = {name: (result / name).read_text() for name in names}
        configs["linux.fragment"] = linux_config(profile)

        def compile_python(tree: Tree) -> None:
            buildroot_tree.compile_python(tree, output / PYTHON)

        # Our own cache in the user's own directory, written above: as trustworthy as this program.
        tree = Tree(pickle.loads((result / "tree.pickle").read_bytes()))
        return Built(
            kernel_version=facts["kernel_version"],
            image=result / IMAGE[profile.arch],
            vmlinux=result / "vmlinux",
            tree=tree,
            components=tuple(
                Component(name, version, "buildroot", licence=licence) for name, version, licence in facts["components"]
            ),
            configs=configs,
            provenance={
                "buildroot": source.provenance,
                "toolchain": toolchain.kind,
                **{f"toolchain:{name}": version for name, version in toolchain.packages.items()},
                "defconfig_sha256": buildroot_config.digest(configs["buildroot.defconfig"]),
                "linux_config_sha256": hashlib.sha256(configs["linux.config"].encode()).hexdigest(),
            },
            compile_python=compile_python if facts["python"] else None,
        )

    def _output(self, profile: Profile, source: Source, toolchain: Toolchain) -> Path:
        """One output directory per profile, and per choice that makes every object file stale."""
        nowhere = Path("/nowhere")
        text = buildroot_config.defconfig(profile, toolchain, Settings(nowhere), "", nowhere, nowhere)
        choice = cache.digest(
            {
                "commit": source.commit or source.release,
                "toolchain": toolchain.identity,
                "symbols": {
                    symbol: value for symbol, value in kconfig.parse_config(text).items() if symbol.startswith(_GLOBAL)
                },
            }
        )
        return cache.root() / "buildroot" / f"{profile.target}-{choice[:12]}"

    def _key(self, profile: Profile, source: Source, toolchain: Toolchain) -> str:
        modules = [sys.modules[__name__], buildroot_config, buildroot_kernel, buildroot_tree, buildroot_toolchain]
        modules += [trees, elf, load_order, bytecode]
        return cache.digest(
            {
                "source": source.provenance,
                "toolchain": toolchain.identity,
                "template": (EXTERNAL.parent / "configs" / buildroot_config.TEMPLATE).read_text(),
                "features": [feature.file.read_text() for feature in profile.features],
                "profile": profile.file.read_text(),
                "kernel": linux_config(profile),
                "override": _text(self.options.override_file),
                "external": external_files(),
                "arch": profile.arch,
                "code": cache.code_digest(*modules),
            }
        )


STATE = "hostos.state.json"
# Buildroot's own interpreter for the build machine, which makes the byte code of the guest's modules.
PYTHON = "host/bin/python3"


def find_result(key: str, output: Path) -> Path | None:
    """The finished result of `key`, None when there is none. One that needs the interpreter in `output`
    counts only while that is there: a result outlives an output directory removed to make room."""
    found = cache.find("buildroot", key)
    if found is None:
        return None
    facts = json.loads((found / "facts.json").read_text())
    return found if not facts["python"] or (output / PYTHON).exists() else None


def _text(path: Path | None) -> str:
    return path.read_text() if path is not None and path.is_file() else ""


def _state(output: Path) -> Mapping[str, Any] | None:
    """What the output directory was last built for (`info`, `config`, `external`), None when it is new."""
    file = output / STATE
    if not file.exists():
        return None
    state = json.loads(file.read_text())
    assert isinstance(state, dict)
    return {"external": external_files(), **state}


def external_files() -> dict[str, str]:
    """Every file of the external tree with its SHA-256."""
    files = sorted(path for path in EXTERNAL.rglob("*") if path.is_file())
    return {path.relative_to(EXTERNAL).as_posix(): cache.file_digest(path) for path in files}


def _write_state(prepared: Prepared) -> None:
    keep = ("version", "stamp_dir", "dependencies", "reverse_dependencies", "type")
    info = {name: {key: package.get(key) for key in keep} for name, package in prepared.info.items()}
    partial = prepared.output / f"{STATE}.part"
    partial.write_text(json.dumps({"info": info, "config": dict(prepared.config), "external": external_files()}))
    partial.replace(prepared.output / STATE)


def show_info(source: Source, output: Path) -> dict[str, Any]:
    """Buildroot's own description of every package of the configuration."""
    text = run([*make(source, output, "-s", "show-info")], env=buildroot_host.environment())
    start = text.find("{")
    if start < 0:
        raise failure(f"Buildroot's show-info answered nothing:\n{text[-500:]}", f"make -C {output} show-info")
    found = json.loads(text[start:])
    assert isinstance(found, dict)
    return {name: package for name, package in found.items() if package.get("type") in ("host", "target")}


def version_of(package: Mapping[str, Any]) -> str:
    """A package's version; with `-custom` when its source came by the override file, so that it need
    not be the version Buildroot names."""
    version = str(package.get("version") or "")
    return f"{version}-custom" if str(package.get("stamp_dir", "")).endswith("-custom") else version


def finished_packages(output: Path) -> set[str]:
    """Names of build directories whose package is completely installed."""
    return {stamp.parent.name for stamp in (output / "build").glob("*/.stamp_installed")}


def check_sources(prepared: Prepared) -> None:
    """Raise `UserError` listing every source archive an offline build would not find.

    Only directories can be looked into: with a primary site that is a server, Buildroot finds out.
    """
    settings = prepared.settings
    site = settings.primary_site
    if not site.startswith("file://"):
        return
    overridden = overridden_packages(_text(settings.override_file))
    places = [settings.dl_dir, Path(site.removeprefix("file://"))]
    missing = []
    for name, package in sorted(prepared.info.items()):
        # Without hashes: taken from a directory (our own client), not from an archive.
        if name.removeprefix("host-") in overridden or name in overridden or not package.get("hashes"):
            continue
        for download in package.get("downloads", ()):
            file = download["source"]
            directory = package.get("dl_dir") or name.removeprefix("host-")
            if not any((place / sub / file).is_file() for place in places for sub in (directory, "")):
                missing.append(f"{file} ({name})")
    if missing:
        raise UserError(
            f"--offline, and {len(missing)} source archive(s) are neither in {settings.dl_dir} nor in {site}:\n    "
            + "\n    ".join(sorted(set(missing))),
            "fill the download directory where there is a network: invoke source",
        )


def overridden_packages(text: str) -> set[str]:
    """Packages that a BR2_PACKAGE_OVERRIDE_FILE gives a source directory, as Buildroot names them."""
    found = set()
    for line in text.splitlines():
        name, sign, _ = line.partition("_OVERRIDE_SRCDIR")
        if sign and name.replace("_", "").isalnum() and name.isupper():
            found.add(name.lower().replace("_", "-"))
    return found
