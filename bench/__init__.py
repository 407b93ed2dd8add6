"""Benchmarks: hostos beside a peer in the same run, reported as ratios (docs/benchmarks.md)."""

import compileall
import os
from pathlib import Path

# What is measured has its byte code, as where it has been installed; else each start compiles its modules anew (0.1 s),
# wherever this variable is set, as in many containers.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
compileall.compile_dir(Path(__file__).parent.parent / "hostos", quiet=1)
