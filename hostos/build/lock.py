"""The lock file: exactly which Debian packages an OS is built from.

`configs/locks/<profile>-<arch>.json` pins version and SHA-256 of every package, so the same
checkout gives the same bytes on another machine and another day, as long as a mirror has them.

A build never runs a foreign binary. The one program of the guest that it does run, the Python that
compiles the guest's modules (bytecode.py), is therefore locked a second time: as it is for machines of
the other architecture.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hostos.build import cache
from hostos.build import profile as profiles
from hostos.build.debian_archive import Archive, Gone, Package
from hostos.build.profile import ARCHES, Profile
from hostos.errors import UserError
from hostos.steps import Step, Steps

SCHEMA = 1
# What compiles the guest's Python modules; any of them that is not locked is not needed.
INTERPRETER = ("python3.13-minimal", "libpython3.13-minimal", "libpython3.13-stdlib", "libc6", "zlib1g", "libexpat1")


@dataclass(frozen=True)
class Lock:
    """`requested`: what was asked for; `root`: those packages and their dependencies; `kernel`: the
    package with the kernel source; `interpreter`: the packages of `INTERPRETER`, in the guest's
    version, for each architecture but the guest's."""

    suite: str
    requested: tuple[str, ...]
    root: tuple[Package, ...]
    kernel: Package
    interpreter: Mapping[str, tuple[Package, ...]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    def python_for(self, machine: str) -> tuple[Package, ...]:
        """The guest's Python as packages that a `machine` (an architecture) can run; () if there is none."""
        if machine in self.interpreter:
            return self.interpreter[machine]
        return tuple(package for package in self.root if package.name in INTERPRETER)


@dataclass(frozen=True)
class Locked:
    """A lock with its packages on this machine, `files` in the order of `lock.root`; `interpreter`:
    those of the guest's Python that run here."""

    lock: Lock
    files: tuple[Path, ...]
    kernel_source: Path
    interpreter: tuple[Path, ...] = ()


def lock_file(profile: Profile) -> Path:
    return profiles.CONFIGS / "locks" / f"{profile.target}.json"


def requested_packages(profile: Profile) -> tuple[str, ...]:
    return tuple(sorted({name for feature in profile.features for name in feature.debian.packages}))


def read(path: Path) -> Lock:
    """Raises `UserError` when the file is not a lock of this schema."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        return Lock(
            suite=values["suite"],
            requested=tuple(values["requested"]),
            root=tuple(Package(**each) for each in values["root"]),
            kernel=Package(**values["kernel"]),
            interpreter={
                arch: tuple(Package(**each) for each in packages)
                for arch, packages in values.get("interpreter", {}).items()
            },
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no lock file of this hostos: {error}", "renew it: invoke build --update") from None


def obtain(profile: Profile, steps: Steps, *, update: bool = False, locked: bool = False) -> Locked:
    """The profile's packages: as locked where possible, resolved anew where not.

    With `update` the lock is renewed. With `locked` it must be there, fit the profile and be
    obtainable: anything else is a `UserError`. Without either, a lock that no longer fits, or whose
    packages the mirror has dropped, is renewed with a warning.
    """
    path = lock_file(profile)
    archive = Archive(profile.debian["suite"], profile.arch)
    with steps.step("packages") as step:
        if path.exists() and not update:
            lock = read(path)
            if (problem := _misfit(lock, profile)) is None:
                try:
                    return _fetch(lock, archive, step)
                except Gone as error:
                    problem = error.message
            if locked:
                raise UserError(f"{path} cannot be used: {problem}", "renew it: invoke build --update")
            steps.warning(f"{path.name}: {problem}; using the newest packages instead")
        elif locked:
            raise UserError(f"there is no lock file {path}", "make one: invoke build --update")
        kernel_name = profile.debian["kernel_source"]
        requested = requested_packages(profile)
        with cache.alone("packages", step):
            archive.update(step)
            kernel = next(each for each in archive.resolve([kernel_name]) if each.name == kernel_name)
            root = tuple(archive.resolve(requested))
            lock = Lock(archive.suite, requested, root, kernel, _interpreters(profile, root, step))
        obtained = _fetch(lock, archive, step)
        path.parent.mkdir(exist_ok=True)
        path.write_text(lock.to_json(), encoding="utf-8")
        steps.note(f"locked {len(lock.root) + 1} packages in {path}")
        return obtained


def _interpreters(profile: Profile, root: Sequence[Package], step: Step) -> dict[str, tuple[Package, ...]]:
    """The guest's Python for machines of other architectures."""
    names = [package.name for package in root if package.name in INTERPRETER]
    if not names or not _has_python(profile):
        return {}
    found = {}
    for arch in ARCHES:
        if arch != profile.arch:
            archive = Archive(profile.debian["suite"], arch)
            archive.update(step)
            found[arch] = tuple(each for each in archive.resolve(names) if each.name in names)
    return found


def _has_python(profile: Profile) -> bool:
    return any(feature.debian.python for feature in profile.features)


def _misfit(lock: Lock, profile: Profile) -> str | None:
    if lock.suite != profile.debian["suite"]:
        return f"locked for {lock.suite}, the profile wants {profile.debian['suite']}"
    if lock.kernel.name != profile.debian["kernel_source"]:
        return f"locked with {lock.kernel.name}, the profile wants {profile.debian['kernel_source']}"
    if lock.requested != requested_packages(profile):
        changed = sorted(set(lock.requested) ^ set(requested_packages(profile)))
        return f"the features' packages have changed ({', '.join(changed)})"
    machine = platform.machine()
    if _has_python(profile) and machine != profile.arch and machine not in lock.interpreter:
        return f"locked without a Python that runs on {machine}"
    return None


def _fetch(lock: Lock, archive: Archive, step: Step) -> Locked:
    *files, kernel = archive.fetch([*lock.root, lock.kernel], step)
    interpreter = lock.python_for(platform.machine())
    step.detail = f"{len(files) + 1} packages, {lock.suite}"
    return Locked(lock, tuple(files), kernel, tuple(archive.fetch(interpreter, step)))


def provides(lock: Lock, names: Sequence[str]) -> list[Package]:
    """The locked packages of these names. Raises `UserError` naming one that is missing."""
    by_name = {package.name: package for package in lock.root}
    if missing := [name for name in names if name not in by_name]:
        raise UserError(f"the lock has no package {', '.join(missing)}", "renew it: invoke build --update")
    return [by_name[name] for name in names]
