"""What tests of images as roots share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hostos.quickstart import demonstration_image
from hostos.steps import Steps


@pytest.fixture(scope="session")
def archive() -> Path:
    """A Debian system: the quick start's, or what HOSTOS_TEST_SYSTEM names (systemd and openssh-server in it)."""
    named = os.environ.get("HOSTOS_TEST_SYSTEM")
    return Path(named) if named else demonstration_image(Steps())


@pytest.fixture(scope="session")
def system(session_hostos: Any, archive: Path) -> str:
    """Its hash, published as test/system."""
    return str(session_hostos("image", "publish", archive, "--name", "test/system", timeout=900).ok().out.strip())
