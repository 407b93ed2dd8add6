"""Results kept by content: a result is found again only when every input is the same.

Each kind of result has a directory below the build cache, each result a directory named by the
SHA-256 of its inputs. Results appear by rename, so an interrupted build leaves none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from hostos.locking import exclusive
from hostos.paths import cache_dir
from hostos.steps import Step

KEEP = 6
# Seconds to wait for another build that uses the same directories: a kernel on a slow machine takes an hour.
PATIENCE = 3 * 3600.0


def digest(inputs: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of JSON-able inputs, independent of their order."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def code_digest(*modules: ModuleType) -> str:
    """SHA-256 of the source of the modules that make a result: changed code is a changed input."""
    total = hashlib.sha256()
    for module in modules:
        assert module.__file__ is not None
        total.update(Path(module.__file__).read_bytes())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def root() -> Path:
    return cache_dir() / "build"


def find(kind: str, key: str) -> Path | None:
    """The directory of a finished result, or None."""
    path = root() / kind / key
    if not path.is_dir():
        return None
    os.utime(path)
    return path


@contextmanager
def alone(what: str, step: Step) -> Iterator[None]:
    """No other build works in the cache's directories for `what` while the body runs.

    Raises UserError (status 1) if another does for hours.
    """
    root().mkdir(parents=True, exist_ok=True)
    why = f"another build works on the {what}"
    with exclusive(root() / f"{what}.lock", PATIENCE, why, lambda: step.progress(f"waiting: {why}")):
        yield


@contextmanager
def create(kind: str, key: str) -> Iterator[Path]:
    """A new directory to put a result into; it becomes `find(kind, key)` when the block ends well.

    The results of that kind used longest ago are removed, all but the newest few.
    """
    parent = root() / kind
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f".{key[:16]}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        final = parent / key
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _prune(parent)


def _prune(parent: Path) -> None:
    results = sorted((path for path in parent.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    finished = [path for path in results if not path.name.startswith(".")]
    stale = [path for path in results if path.name.startswith(".") and path.stat().st_mtime < time.time() - 86400]
    for path in [*finished[:-KEEP], *stale]:
        shutil.rmtree(path, ignore_errors=True)
