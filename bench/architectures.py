"""aarch64 beside x86_64: exec to SSH, both emulated, in turn in one run; what there is to download."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.harness import Comparison, Series, prepare, publish
from hostos.errors import UserError, failure
from hostos.machine import os_image, template
from hostos.steps import Steps

# The smallest form of each kernel that boot loaders take, and the initrd.
_FILES = {"x86_64": ("bzImage", "initrd.gz"), "aarch64": ("Image.gz", "initrd.gz")}


def run(rounds: int, steps: Steps) -> Path:
    """Boot each `rounds` times and publish. Raises `UserError` when a build is missing."""
    images = {arch: os_image.find(None, arch=arch) for arch in os_image.ARCHITECTURES}
    before = prepare()
    ssh = {arch: Series(f"{arch}, to SSH") for arch in images}
    whole = {arch: Series(f"{arch}, whole command") for arch in images}
    with tempfile.TemporaryDirectory(prefix="hostos-bench-") as scratch:
        for number in range(rounds):
            for arch, image in images.items():
                with steps.step(f"{arch} {number + 1}") as step:
                    seconds, last = _up(Path(scratch, "home"), arch, image.directory)
                    whole[arch].samples.append(seconds)
                    ssh[arch].samples.append(seconds - last)
                    step.detail = f"{seconds - last:.2f} s"
    sizes = {arch: Series(f"{arch}, kernel and initrd.gz", "MB") for arch in images}
    for arch, image in images.items():
        sizes[arch].samples.append(sum((image.directory / name).stat().st_size for name in _FILES[arch]) / 1e6)
    return publish(
        "architectures",
        [
            _beside("exec to the first SSH command, booted, emulated", ssh, 1.5),
            _beside("the whole command: until systemd has started everything", whole, None),
            _beside("size", sizes, 1.15),
        ],
        before,
    )


def _beside(title: str, series: dict[str, Series], goal: float | None) -> Comparison:
    arm = series["aarch64"]
    return Comparison(title, series["x86_64"].name, list(series.values()), {arm.name: goal} if goal else {})


def _up(home: Path, arch: str, directory: Path) -> tuple[float, float]:
    """Seconds of a whole `hostos up`, and of its last stage (systemd); the machine is ended again."""
    env = {**os.environ, "HOSTOS_HOME": str(home), template.SWITCH: "off"}
    hostos = str(Path(sys.executable).parent / "hostos")
    name = arch.replace("_", "-")
    words = ["up", "-m", name, "--os", str(directory), "--cold", "--accel", "tcg", "--json"]
    began = time.monotonic()
    done = subprocess.run([hostos, *words], env=env, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if done.returncode:
        raise failure(f"hostos up failed: {done.stderr}")
    stages = json.loads(done.stdout.strip().splitlines()[-1])["stages"]
    subprocess.run([hostos, "kill", "-m", name], env=env, capture_output=True, check=False)
    if not stages:
        raise UserError("the machine has no stages to measure")
    return seconds, sum(stage["seconds"] for stage in stages if stage["name"] == "system is up")
