"""`FILE.toml.lock`: what a recipe was built from last, so that it can be built again to the same hash."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostos.errors import UserError, failure
from hostos.image.buildcache import Package, Packages

SCHEMA = 1
KIND = "hostos-recipe-lock"
MAX_LOCK = 32 << 20


@dataclass
class Locked:
    """One recipe of a file. `epoch`: no file is later (SOURCE_DATE_EPOCH); `parent`: the image that `source`,
    the recipe's `from`, meant.

    `snapshots`: which image each of the base's snapshots was, by how the recipe names it;
    `packages`: of the base, by what it says, then of each step that installed some, by the step's text;
    `trace`: SHA-256 of the recording; `image`: what came of it all.
    """

    epoch: int
    parent: str = ""
    source: str = ""
    packages: dict[str, Packages] = field(default_factory=dict)
    trace: str = ""
    image: str = ""
    snapshots: dict[str, str] = field(default_factory=dict)


def path_of(recipe: Path) -> Path:
    return recipe.with_name(f"{recipe.name}.lock")


def read(recipe: Path) -> dict[str, Locked]:
    """By type (`""`: the file's own recipe); empty if there is no lock file. Raises UserError if it is damaged."""
    path = path_of(recipe)
    hint = f"make it anew: hostos image build {recipe} --update"
    try:
        if path.stat().st_size > MAX_LOCK:
            raise UserError(f"{path}: more than {MAX_LOCK} bytes: no lock file", hint)
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}", hint) from None
    try:
        if value["kind"] != KIND or value["schema"] != SCHEMA:
            raise UserError(
                f"{path}: schema {value['schema']!r} of {value['kind']!r}, this hostos knows {SCHEMA}", hint
            )
        return {name: _locked(each) for name, each in value["recipes"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged", hint) from None


def _locked(value: Any) -> Locked:
    packages = {
        step: {name: Package(str(version), str(sha256)) for name, (version, sha256) in found.items()}
        for step, found in value["packages"].items()
    }
    texts = {name: str(value[name]) for name in ("parent", "source", "trace", "image")}
    snapshots = {str(name): str(image) for name, image in value.get("snapshots", {}).items()}
    return Locked(int(value["epoch"]), snapshots=snapshots, packages=packages, **texts)


def write(recipe: Path, locks: dict[str, Locked]) -> None:
    """One package a line, so that a diff of two locks can be read. Raises a failure."""
    from hostos.machine.files import write_atomic

    recipes = {
        name: {
            "epoch": lock.epoch,
            "parent": lock.parent,
            "source": lock.source,
            **({"snapshots": lock.snapshots} if lock.snapshots else {}),
            "packages": {
                step: {each: [package.version, package.sha256] for each, package in sorted(found.items())}
                for step, found in sorted(lock.packages.items())
            },
            "trace": lock.trace,
            "image": lock.image,
        }
        for name, lock in sorted(locks.items())
    }
    text = json.dumps({"schema": SCHEMA, "kind": KIND, "recipes": recipes}, indent=1)
    # A package's version and hash belong on its line.
    text = "\n".join(_joined(text.splitlines())) + "\n"
    try:
        write_atomic(path_of(recipe), text.encode())
    except OSError as error:
        raise failure(f"{path_of(recipe)}: {error.strerror}", "the recipe's directory must be writable") from None


def _joined(lines: list[str]) -> list[str]:
    result: list[str] = []
    for line in lines:
        inside = bool(result) and result[-1].count("[") > result[-1].count("]")
        if inside:
            result[-1] += line.strip() + (" " if line.endswith(",") else "")
        else:
            result.append(line)
    return [line.rstrip() for line in result]
