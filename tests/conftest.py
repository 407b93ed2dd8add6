"""What tests with real machines share: the `hostos` command with a home of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import programs
import pytest

from hostos.build.engines import buildroot_source
from hostos.build.engines.buildroot_source import Source
from hostos.steps import Step

# What an example may take says nothing on a machine that does other things, too.
hypothesis.settings.register_profile("hostos", deadline=None)
hypothesis.settings.load_profile("hostos")

REPOSITORY = Path(__file__).resolve().parent.parent
# A machine is given this long to come up, whatever else the host is doing.
BOOT_SECONDS = 240.0


# What runs machines and networks in real time: on a loaded host one packet or one deadline in thousands is lost.
# A fault of ours fails twice. (docs/testing.md)
RERUN_ONCE = frozenset({"boot", "fault", "swarm", "soak"})


def pytest_configure() -> None:
    # A shell that starts the tests in the background has them ignore Ctrl-C, and so would everything they start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if RERUN_ONCE & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.flaky(reruns=1))


@dataclass(frozen=True)
class Result:
    """A command that has ended."""

    status: int
    out: str
    err: str

    def ok(self) -> Result:
        assert self.status == 0, f"exit {self.status}\n{self.out}\n{self.err}"
        return self

    def json(self) -> Any:
        """What it printed; of events, one a line, the last: what came of it."""
        try:
            return json.loads(self.ok().out)
        except ValueError:
            return json.loads(self.out.splitlines()[-1])


@dataclass
class Hostos:
    """The `hostos` command as a user runs it; all it keeps is below `home`. `enter`: what comes before the command,
    to run it in a network namespace."""

    home: Path
    os_dir: Path
    enter: Sequence[str] = ()
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def words(self, *words: str | Path) -> list[str]:
        return [*self.enter, sys.executable, "-c", "from hostos.cli import main; main()", *map(str, words)]

    def __call__(self, *words: str | Path, input: str = "", timeout: float = BOOT_SECONDS) -> Result:
        done = subprocess.run(
            self.words(*words),
            input=input.encode(),
            capture_output=True,
            timeout=timeout,
            env=self.env(),
            cwd=self.home.parent,
        )
        return Result(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    @property
    def arch(self) -> str:
        """Of the OS under test."""
        return str(json.loads((self.os_dir / "manifest.json").read_text())["arch"])

    @property
    def kernel(self) -> Path:
        """What any hypervisor boots."""
        return self.os_dir / ("Image" if self.arch == "aarch64" else "bzImage")

    def up(self, *words: str | Path) -> Result:
        return self("up", "--os", self.os_dir, *words)

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        """Start it in the background, stdin empty, stdout and stderr piped."""
        child = subprocess.Popen(
            self.words(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.env(),
            cwd=self.home.parent,
        )
        self.started.append(child)
        return child

    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HOSTOS_HOME")}
        # A template made in the background would be one more QEMU, at any moment; who tests them asks for them.
        ours = {"HOSTOS_HOME": str(self.home), "PYTHONPATH": str(REPOSITORY), "HOSTOS_TEMPLATES": "off"}
        return kept | ours | self.environment

    def directory(self, machine: str = "default") -> Path:
        return self.home / "state" / "machines" / machine

    def qemus(self) -> list[int]:
        """The pids of all QEMUs of this home."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if b"qemu-system" in words[0] and any(os.fsencode(self.home) in word for word in words):
                        found.append(int(entry.name))
        return found

    def clean_up(self) -> None:
        for child in self.started:
            child.kill()
            child.communicate()
        for pid in self.qemus():
            os.kill(pid, signal.SIGKILL)
        if (self.home / "state" / "seed").exists():
            self("seed", "stop")
        until = time.monotonic() + 10
        while self.qemus() and time.monotonic() < until:
            time.sleep(0.05)


@pytest.fixture(scope="session")
def os_dir() -> Path:
    """A complete OS build; tests that need one are skipped without."""
    from hostos.errors import UserError
    from hostos.machine import os_image

    directory = programs.OS_DIRECTORY
    try:
        image = os_image.load(directory)
    except UserError as error:
        pytest.skip(f"needs an OS build (invoke build): {error.message}")
    if not shutil.which(f"qemu-system-{image.arch}"):
        pytest.skip(f"needs qemu-system-{image.arch}")
    return directory


@contextlib.contextmanager
def _hostos(os_dir: Path, name: str = "home") -> Iterator[Hostos]:
    # Not below pytest's own directory: socket paths are limited.
    with tempfile.TemporaryDirectory(prefix="h-") as place:
        command = Hostos(Path(place) / name, os_dir)
        try:
            yield command
        finally:
            command.clean_up()


@pytest.fixture(scope="session")
def hostos_with() -> Callable[[Path], contextlib.AbstractContextManager[Hostos]]:
    """The command with an empty home and an OS of the test's own."""
    return _hostos


@pytest.fixture
def hostos(os_dir: Path) -> Iterator[Hostos]:
    """The command with an empty home; whatever it left running is killed."""
    with _hostos(os_dir) as command:
        yield command


@pytest.fixture(scope="session")
def session_hostos(os_dir: Path) -> Iterator[Hostos]:
    """The command with a home for the whole session."""
    with _hostos(os_dir) as command:
        yield command


def make_key(path: Path, *options: str, comment: str = "test") -> Path:
    """A key pair from ssh-keygen; returns the public half."""
    subprocess.run(["ssh-keygen", "-q", *options, "-N", "", "-C", comment, "-f", path], check=True)
    return path.with_name(path.name + ".pub")


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a named key pair, returns the public half's path."""
    place = tmp_path_factory.mktemp("keys")

    def make(name: str, options: Sequence[str] = ("-t", "ed25519"), comment: str = "test") -> Path:
        return make_key(place / name, *options, comment=comment)

    return make


@pytest.fixture(scope="session")
def buildroot() -> Source:
    """A Buildroot tree, when one is at hand."""
    where = os.environ.get("HOSTOS_BUILDROOT_SOURCE")
    if not where:
        pytest.skip("no Buildroot tree at hand: HOSTOS_BUILDROOT_SOURCE=<directory> names one")
    return buildroot_source.obtain(where, Step("test", lambda event: None))
