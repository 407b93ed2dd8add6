"""Invoke tasks. Each is a few lines over hostos.build, hostos.quickstart and bench; `invoke --list`
shows them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from invoke.collection import Collection
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from hostos.errors import UserError
from hostos.hostsystem import host_arch
from hostos.steps import Steps, Talk

HOST = host_arch()


def user_errors(function: Callable[..., None]) -> Callable[..., None]:
    """A `UserError` ends a task with its message and status, Ctrl-C (also a closed terminal, and SIGTERM)
    with 130 and everything it started; neither shows a traceback."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        from hostos.machine.guard import unwinding_on_signals

        try:
            with unwinding_on_signals():
                function(*args, **kwargs)
        except UserError as error:
            raise Exit(f"invoke: {error}", code=error.status) from None
        except KeyboardInterrupt:
            raise Exit("invoke: interrupted", code=130) from None

    return wrapper


PROFILE_HELP = {
    "profile": "what to build: a file in configs/profiles (default: default)",
    "arch": "x86_64 or aarch64 (default: this machine's)",
}


# name -> (default, help) of what only the Buildroot engine takes
BUILDROOT: dict[str, tuple[Any, str]] = {
    "buildroot_source": ("", "a Buildroot work tree, an unpacked release or a git repository (default: upstream)"),
    "toolchain": ("internal", "internal (default), debian (this machine's own gcc) or a toolchain's directory"),
    "primary_site": ("", "directory or URL with source archives, looked at first"),
    "offline": (False, "fetch nothing from anywhere else"),
    "dl_dir": ("", "where source archives are kept"),
    "override_file": ("", "Buildroot's BR2_PACKAGE_OVERRIDE_FILE: packages built from directories"),
    "ccache": (False, "use Buildroot's compiler cache"),
    "jobs": ("", "how many compilers at once (default: one per CPU)"),
}
BUILDROOT_HELP = {name: text for name, (_, text) in BUILDROOT.items()}


def _count(option: str, text: str) -> int:
    """A whole number from 1; 0 when the option was not given. (invoke itself answers with a traceback.)"""
    if text and not (text.isascii() and text.isdecimal() and int(text)):
        raise UserError(f"{option} {text}: not a whole number from 1", f"{option} 2, or without it")
    return int(text or 0)


def buildroot_options(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a task the options of `BUILDROOT`; it gets them as one argument, `options`."""
    own = [each for each in inspect.signature(function).parameters.values() if each.name != "options"]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    more = [inspect.Parameter(name, kind, default=default) for name, (default, _) in BUILDROOT.items()]

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        from hostos.build.engines.buildroot import Options

        given = {name: kwargs.pop(name, default) for name, (default, _) in BUILDROOT.items()}
        for name in ("dl_dir", "override_file"):
            given[name] = Path(given[name]) if given[name] else None
        given["jobs"] = _count("--jobs", given["jobs"])
        source = given.pop("buildroot_source") or None
        function(*args, options=Options(source=source, **given), **kwargs)

    wrapper.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    return wrapper


@task(
    auto_shortflags=False,
    help={
        **PROFILE_HELP,
        **BUILDROOT_HELP,
        "engine": "debian (binary packages, the default) or buildroot (everything from source)",
        "dist": "where the result goes (default: dist)",
        "update": "renew the lock file: the newest packages",
        "locked": "fail rather than use anything that is not locked",
        "verbose": "show every line of progress",
    },
)
@user_errors
@buildroot_options
def build(
    _: Context,
    options: Any,
    profile: str = "default",
    arch: str = HOST,
    engine: str = "debian",
    dist: str = "dist",
    update: bool = False,
    locked: bool = False,
    verbose: bool = False,
) -> None:
    """Build the OS: kernel and initrd, in dist/<profile>-<arch>/."""
    from hostos.build import engines, os_build
    from hostos.build.profile import load_profile

    chosen = load_profile(profile, arch)
    maker = engines.choose(engine, update=update, locked=locked, buildroot=options)
    result = os_build.build(chosen, maker, Steps(Talk(level="verbose" if verbose else "normal")), Path(dist))
    print(result.directory)


@task(auto_shortflags=False, help={**PROFILE_HELP, **BUILDROOT_HELP, "into": "directory to fill (default: bundle)"})
@user_errors
@buildroot_options
def source(_: Context, options: Any, profile: str = "default", arch: str = HOST, into: str = "bundle") -> None:
    """Fetch every source archive, for building with Buildroot where there is no network."""
    from hostos.build.engines import buildroot_tools
    from hostos.build.profile import load_profile

    print(buildroot_tools.fill(load_profile(profile, arch), options, Path(into), Steps(Talk())))


@task(auto_shortflags=False, help={**PROFILE_HELP, **BUILDROOT_HELP, "engine": "linux (default) or buildroot"})
@user_errors
@buildroot_options
def menuconfig(_: Context, options: Any, profile: str = "default", arch: str = HOST, engine: str = "linux") -> None:
    """Edit a configuration in its own menu; only the difference is kept, in configs/features/custom.toml."""
    from hostos.build.engines import buildroot_tools
    from hostos.build.profile import load_profile

    chosen = load_profile(profile, arch)
    changed = buildroot_tools.menuconfig(chosen, options, engine, Steps(Talk()))
    print(changed or "nothing changed")
    if changed and buildroot_tools.CUSTOM not in [feature.name for feature in chosen.features]:
        print(f'to build with it: name "{buildroot_tools.CUSTOM}" in the features of {chosen.file}', file=sys.stderr)


@task(auto_shortflags=False, help={**PROFILE_HELP, **BUILDROOT_HELP, "into": "directory (default: graphs)"})
@user_errors
@buildroot_options
def graph(_: Context, options: Any, profile: str = "default", arch: str = HOST, into: str = "graphs") -> None:
    """Pictures of size, build time and dependencies (Buildroot)."""
    from hostos.build.engines import buildroot_tools
    from hostos.build.profile import load_profile

    for path in buildroot_tools.graph(load_profile(profile, arch), options, Path(into), Steps(Talk())):
        print(path)


@task(auto_shortflags=False, help={**PROFILE_HELP, **BUILDROOT_HELP, "into": "directory (default: legal-info)"})
@user_errors
@buildroot_options
def legal_info(_: Context, options: Any, profile: str = "default", arch: str = HOST, into: str = "legal-info") -> None:
    """Licences, licence texts and sources of everything in the image (Buildroot)."""
    from hostos.build.engines import buildroot_tools
    from hostos.build.profile import load_profile

    print(buildroot_tools.legal_info(load_profile(profile, arch), options, Path(into), Steps(Talk())))


@task(auto_shortflags=False, help={**PROFILE_HELP, **BUILDROOT_HELP})
@user_errors
@buildroot_options
def sbom(_: Context, options: Any, profile: str = "default", arch: str = HOST) -> None:
    """Buildroot's own CycloneDX bill of materials, on stdout (every build also has a sbom.cdx.json)."""
    from hostos.build.engines import buildroot_tools
    from hostos.build.profile import load_profile

    print(buildroot_tools.sbom(load_profile(profile, arch), options, Steps(Talk())), end="")


@task(
    auto_shortflags=False,
    help={**PROFILE_HELP, **BUILDROOT_HELP, "feed": "directory with the NVD JSON feeds (default: nvd)"},
)
@user_errors
@buildroot_options
def cve(_: Context, options: Any, profile: str = "default", arch: str = HOST, feed: str = "nvd") -> None:
    """Known vulnerabilities of what is in the image (Buildroot), from a local NVD feed."""
    from hostos.build.engines import buildroot_tools
    from hostos.build.profile import load_profile

    checked = buildroot_tools.cve(load_profile(profile, arch), options, Path(feed), Steps(Talk()))
    for name, severity, package in buildroot_tools.vulnerabilities(checked):
        print(f"{name}  {severity:8}  {package}")
    if unknown := buildroot_tools.unchecked(checked):
        print(
            f"not checked, as --override-file does not say which version they are: {', '.join(unknown)}\n"
            "  hint: a line <PACKAGE>_CPE_ID_VERSION = <version> in that file says it",
            file=sys.stderr,
        )


@task(help={**PROFILE_HELP, "engine": "linux (the kernel's options, default) or buildroot"})
@user_errors
def render(_: Context, profile: str = "default", arch: str = HOST, engine: str = "linux") -> None:
    """Show a configuration as it is rendered from the features."""
    from hostos.build import render as rendering
    from hostos.build.profile import load_profile

    print(rendering.show(load_profile(profile, arch), engine), end="")


@task(
    help={
        "os": "the build to look at (default: dist/default-<arch>)",
        "most": "how many lines of each kind to show",
        "compare": "another build, of whichever engine: show the differences",
    }
)
@user_errors
def size(_: Context, os: str = f"dist/default-{HOST}", most: int = 25, compare: str = "") -> None:
    """Show what takes the space in a build, or how two builds differ."""
    from hostos.build import size as sizes

    print(sizes.compare(Path(os), Path(compare), most) if compare else sizes.report(Path(os), most), end="")


@task(help={"everything": "the build cache as well: the next build starts from nothing"})
@user_errors
def clean(_: Context, everything: bool = False) -> None:
    """Remove dist/ (and with --everything the build cache)."""
    import shutil

    from hostos.build import cache

    shutil.rmtree("dist", ignore_errors=True)
    if everything:
        shutil.rmtree(cache.root(), ignore_errors=True)


@task(help={"fresh": "build the demonstration image anew even if there is one"})
@user_errors
def quickstart(_: Context, fresh: bool = False) -> None:
    """From nothing to a live-booted container: build, boot, publish, boot from the hash."""
    from hostos import quickstart as guided

    guided.run_tour(fresh=fresh)


# tier -> what pytest selects by its markers, one run for each
_MACHINES = "fault or soak"
_NETWORKS = "(build or swarm or docs) and not fault and not soak"
TIERS = {
    "fast": ["not build and not swarm and not fault and not soak and not docs"],
    "machines": [_MACHINES],
    "networks": [_NETWORKS],
    "slow": [_MACHINES, _NETWORKS],
}
TIERS["all"] = [*TIERS["fast"], *TIERS["slow"]]


@task(
    help={
        "tier": "fast (what a person waits for, default), machines (faults, soak), networks (swarms, builds, docs), "
        "slow (both of these) or all",
        "metal": "build the OS for real machines first (one more kernel): its tests are skipped without",
    }
)
def test(context: Context, tier: str = "fast", metal: bool = False) -> None:  # noqa: PT028
    """Lint, types and tests. Builds the OS first if it must."""
    if tier not in TIERS:
        raise Exit(f"invoke: unknown tier {tier!r}\n  hint: one of: {', '.join(TIERS)}", code=2)
    build(context)
    if metal:
        build(context, profile="metal")
    if tier in ("fast", "all"):
        context.run("ruff check . && ruff format --check . && mypy", echo=True)
    for markers in TIERS[tier]:
        context.run(f"{sys.executable} -m pytest tests -m '{markers}'", echo=True, pty=sys.stdout.isatty())


@task(help={"rounds": "how often each side is measured (default: 5)"})
@user_errors
def bench_boot(_: Context, rounds: int = 5) -> None:
    """exec to SSH, beside debvm."""
    from bench import boot

    boot.run(rounds, Steps(Talk()))


@task(
    iterable=["only"],
    help={
        "rounds": "how often each side is measured (default: 5)",
        "only": "native, init, btfs, cost, guest or crowd (repeatable; default: all)",
    },
)
@user_errors
def bench_live(_: Context, only: list[str], rounds: int = 5) -> None:
    """Live boot over a shaped link, beside download-everything-then-boot and btfs."""
    from bench import live

    live.run(rounds, Steps(Talk()), only)


@task(help={"rounds": "how often each side is measured (default: 3)"})
@user_errors
def bench_traces(_: Context, rounds: int = 3) -> None:
    """Live boot with and without a boot trace, at round trips of 0, 40 and 200 ms."""
    from bench import traces

    traces.run(rounds, Steps(Talk()))


@task(help={"rounds": "how often each side is measured (default: 5)"})
@user_errors
def bench_architectures(_: Context, rounds: int = 5) -> None:
    """aarch64 beside x86_64: exec to SSH, both emulated, and sizes."""
    from bench import architectures

    architectures.run(rounds, Steps(Talk()))


@task(
    help={
        "rounds": "how often each side is measured (default: 3)",
        "large": "GiB of one large file, for the memory it takes (default: 0, none)",
    }
)
@user_errors
def bench_mirror(_: Context, rounds: int = 3, large: int = 0) -> None:
    """The package cache over a shaped mirror, beside the mirror itself and apt-cacher-ng."""
    from bench import mirror

    mirror.run(rounds, Steps(Talk()), large)


@task(
    iterable=["only"],
    help={
        "rounds": "how often each side is measured (default: 3)",
        "only": "children, packing, import or root (repeatable; default: all)",
    },
)
@user_errors
def bench_image(_: Context, only: list[str], rounds: int = 3) -> None:
    """What a child image costs; packing beside mksquashfs, importing beside umoci; up --root over a shaped link."""
    from bench import image

    image.run(rounds, Steps(Talk()), only)


namespace = Collection(build, render, menuconfig, source, size, graph, legal_info, sbom, cve, clean, quickstart, test)
benchmarks = Collection("bench")
benchmarks.add_task(bench_boot, "boot")
benchmarks.add_task(bench_live, "live")
benchmarks.add_task(bench_traces, "traces")
benchmarks.add_task(bench_image, "image")
benchmarks.add_task(bench_architectures, "architectures")
benchmarks.add_task(bench_mirror, "mirror")
namespace.add_collection(benchmarks)
