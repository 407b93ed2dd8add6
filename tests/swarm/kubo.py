"""A real IPFS node for the tests: Kubo, off line, with a repository of its own.

It is looked for as $HOSTOS_KUBO, `ipfs` on the PATH, and ~/.cache/hostos-tests/ipfs; docs/ipfs.md says how to
build it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

CACHED = Path.home() / ".cache/hostos-tests/ipfs"


def find() -> str | None:
    for place in (os.environ.get("HOSTOS_KUBO"), shutil.which("ipfs"), str(CACHED)):
        if place and os.access(place, os.X_OK):
            return place
    return None


@dataclass
class Kubo:
    program: str
    repository: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        # The profile "test" has no bootstrap peers, random ports on loopback, and no discovery.
        self.run("init", "--profile=test", "--empty-repo")
        self.run("config", "--json", "AutoConf.Enabled", "false")
        self.run("bootstrap", "rm", "--all")
        with (self.repository / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [self.program, "daemon", "--offline"], stdout=log, stderr=log, env=self.environment
            )
        end = time.monotonic() + 60
        while b"Daemon is ready" not in (self.repository / "log").read_bytes():
            assert self.process.poll() is None, (self.repository / "log").read_text()
            assert time.monotonic() < end, "Kubo did not start"
            time.sleep(0.05)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "IPFS_PATH": str(self.repository), "IPFS_TELEMETRY": "off"}

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [self.program, *arguments], env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @property
    def api(self) -> str:
        return "http://127.0.0.1:" + (self.repository / "api").read_text().strip().rpartition("/")[2]

    @property
    def gateway(self) -> str:
        return (self.repository / "gateway").read_text().strip()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
