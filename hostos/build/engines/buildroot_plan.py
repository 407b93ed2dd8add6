"""What has to be built again after a change of configuration.

Buildroot itself knows only "is this package built" and leaves the rest to the user, whose safe
choice is to build everything again. Its own `show-info` says what every package depends on, which
is enough to do better:

- a change of toolchain, architecture or optimisation gives another output directory (buildroot.py);
- a package whose own symbols, version or dependencies changed is rebuilt, and so is every package
  that depends on it;
- when a package or a file-removing option is gone, the target directory is filled again from the
  packages' build directories (nothing is compiled for that).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hostos.build.engines.buildroot_config import PLACES
from hostos.build.profile import Value

# Where sources come from and what runs the build: nothing in the image depends on it.
_MEANS = (*PLACES, "DOWNLOAD_", "DEFCONFIG", "HOST_DIR", "EXTERNAL")

Info = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """`rebuild`: packages to build again from their source, sorted; `reconfigure`: packages that can
    tell by themselves what of them is stale; `refill`: start with an empty target directory."""

    rebuild: tuple[str, ...] = ()
    reconfigure: tuple[str, ...] = ()
    refill: bool = False

    def __bool__(self) -> bool:
        return bool(self.rebuild or self.reconfigure or self.refill)


def plan(
    old: Info,
    new: Info,
    old_config: Mapping[str, Value],
    new_config: Mapping[str, Value],
    touched: Iterable[str] = (),
) -> Plan:
    """Compare two states of one output directory: Buildroot's show-info and .config of each.

    `touched`: files of the external tree that changed, relative to it.
    """
    changed = {
        symbol
        for symbol in old_config.keys() | new_config.keys()
        if _given(old_config, symbol) != _given(new_config, symbol) and not symbol.startswith(_MEANS)
    }
    kept = old.keys() & new.keys()
    direct = {name for name in kept if _differ(old[name], new[name], ("version", "stamp_dir", "dependencies"))}
    for symbol in changed:
        if (owner := owning_package(symbol, new)) in kept:
            direct.add(str(owner))
    for file in touched:
        owners = {owning_package(symbol, new) for symbol, value in new_config.items() if file in str(value)}
        if file.startswith("package/"):
            owners.add(file.split("/")[1])
        direct |= {str(owner) for owner in owners if owner in kept}
    rebuild = set(direct)
    todo = list(direct)
    while todo:
        name = todo.pop()
        for dependent in new[name].get("reverse_dependencies", ()):
            if dependent in kept and dependent not in rebuild and _is_library(name, new[name]):
                rebuild.add(dependent)
                todo.append(dependent)
    gone = {name for name in old.keys() - new.keys() if not name.startswith("host-")}
    system = any(not symbol.startswith(("PACKAGE_", "LINUX_KERNEL")) for symbol in changed)
    # Kbuild compares command lines: another configuration compiles only what differs.
    again = {name for name in rebuild & {"linux"} if not _differ(old[name], new[name], ("version", "stamp_dir"))}
    rebuild -= again
    return Plan(tuple(sorted(rebuild)), tuple(sorted(again)), refill=bool(gone or system or rebuild))


def owning_package(symbol: str, info: Info) -> str | None:
    """The package a symbol (without BR2_) belongs to: the longest name it begins with."""
    if symbol.startswith("LINUX_KERNEL") and "linux" in info:
        return "linux"
    if not symbol.startswith("PACKAGE_"):
        return None
    rest = symbol.removeprefix("PACKAGE_")
    best = None
    for name in info:
        upper = name.upper().replace("-", "_").replace(".", "_")
        if (rest == upper or rest.startswith(f"{upper}_")) and (best is None or len(name) > len(best)):
            best = name
    return best


def _given(config: Mapping[str, Value], symbol: str) -> Value:
    return config.get(symbol, False)


def _is_library(name: str, package: Mapping[str, Any]) -> bool:
    """Whether other packages are compiled against it. Host tools are programs, and so is what puts
    nothing into the staging directory: it is a dependency for the order of installation only."""
    if name.startswith("host-"):
        return False
    return bool(package.get("virtual")) or package.get("install_staging") is not False


def _differ(old: Mapping[str, Any], new: Mapping[str, Any], facts: Iterable[str]) -> bool:
    """Whether a fact that both states know differs: an older hostos recorded fewer. The name of the
    build directory (`stamp_dir`) says whether the source is overridden."""
    return any(
        sorted(old[fact]) != sorted(new[fact]) if isinstance(old[fact], list) else old[fact] != new[fact]
        for fact in facts
        if old.get(fact) is not None and new.get(fact) is not None
    )
