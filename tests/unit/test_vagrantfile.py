import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("vagrant") is None, reason="vagrant is not installed")
def test_vagrant_accepts_it():
    subprocess.run(["vagrant", "validate", "--ignore-provider"], cwd=REPOSITORY, check=True, timeout=120)


def test_it_runs_the_same_bootstrap():
    assert "./bootstrap" in (REPOSITORY / "Vagrantfile").read_text()
