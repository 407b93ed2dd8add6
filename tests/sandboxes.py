"""A place for tests that build in the sandbox."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.image import sandbox


@contextmanager
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for everything, which everybody may pass through: the sandbox's root is nobody here, and pytest
    closes its own. Skips where there can be no sandbox."""
    try:
        sandbox.inside_works()
    except UserError as error:
        pytest.skip(str(error))
    path = Path(tempfile.mkdtemp(prefix="hostos-test-", dir="/var/tmp"))
    path.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(path))
    try:
        yield path
    finally:
        # Not ours alone: what the sandbox made belongs to its users.
        subprocess.run(["rm", "-rf", str(path)], check=False)
