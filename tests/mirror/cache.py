"""A real package cache in the background, with a home of its own, and apt with directories of its own."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hostos import background
from hostos.mirror.settings import Settings
from hostos.mirror.upstreams import Apt, Pacman, Upstreams, save

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCALE = float(os.environ.get("HOSTOS_TIMEOUT_SCALE", "1"))
background.START_DEADLINE = 30.0 * SCALE


@dataclass
class Cache:
    """`home`: a short path; `inside`: words before a command, to run it in a network namespace."""

    home: Path
    apt: tuple[Apt, ...] = ()
    pacman: tuple[Pacman, ...] = ()
    inside: Sequence[str] = ()
    settings: Settings = field(default_factory=lambda: Settings(listen=("127.0.0.1:0",)))
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "HOSTOS_HOME": str(self.home), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}

    def hostos(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [*self.inside, sys.executable, "-c", "from hostos.cli import main; main()", "mirror", *words]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=120)
        assert not check or done.returncode == 0, done.stderr + done.stdout + self.log()
        assert "Traceback" not in done.stderr
        return done

    @property
    def place(self) -> background.Place:
        return background.Place(self.home / "state/mirror", self.home / "run/mirror.sock", "mirror")

    def start(self, **settings: Any) -> Cache:
        """As `hostos mirror start` does it, without the second that the command line takes."""
        self.configure()
        self.settings = replace(self.settings, **settings)
        place = self.place
        for directory in (place.directory, place.socket.parent):
            directory.mkdir(parents=True, exist_ok=True)
        file = place.directory / "settings.json"
        file.write_text(self.settings.to_json())
        command = [*self.inside, sys.executable, "-W", "ignore", "-m", "hostos.mirror.daemon", "--settings", str(file)]
        command += ["--state", str(place.directory), "--socket", str(place.socket), "--data", str(self.store)]
        command += ["--upstreams", str(self.home / "config/mirror.toml")]
        with background.changing(place):
            background.spawn(place, command, hint="")
        self.info = self.status()
        return self

    def configure(self) -> None:
        save(Upstreams(self.apt, self.pacman), self.home / "config/mirror.toml")

    def stop(self) -> None:
        background.stop(self.place)

    def status(self) -> dict[str, Any]:
        answer = background.request(self.place, "status")
        assert answer is not None, self.log()
        return answer

    def stats(self) -> dict[str, Any]:
        answer = background.request(self.place, "stats")
        assert answer is not None, self.log()
        return answer

    def log(self) -> str:
        path = self.home / "state/mirror/mirror.log"
        return path.read_text() if path.exists() else ""

    def kill(self) -> None:
        """The supervisor and the worker, with no chance to tidy up."""
        supervisor = json.loads((self.home / "state/mirror/mirror.json").read_text())["pid"]
        for pid in (supervisor, self.info["pid"]):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not (Path("/proc") / str(self.info["pid"]) / "exe").exists())

    @property
    def address(self) -> str:
        return str(self.info["listen"][0])

    @property
    def proxy(self) -> str:
        return f"http://{self.address}"

    @property
    def store(self) -> Path:
        return self.home / "data/mirror"

    def held(self) -> list[Path]:
        return [path for path in (self.store / "sha256").rglob("*") if path.is_file()]

    def partials(self) -> list[Path]:
        return list((self.store / "partial").iterdir())

    def get(self, url: str, method: str = "GET", **headers: str) -> Answer:
        """One request as a proxy's client makes it. The body may be cut short."""
        host, _, port = self.address.rpartition(":")
        client = http.client.HTTPConnection(host, int(port), timeout=60)
        client.request(method, url, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = client.getresponse()
        try:
            body, whole = response.read(), True
        except http.client.IncompleteRead as error:
            body, whole = error.partial, False
        except ConnectionError:
            body, whole = b"", False
        client.close()
        if (response.status, method, whole) == (200, "GET", True):
            # It is synced, and then taken over into the store, after the last byte has been sent.
            partial = self.store / "partial" / hashlib.sha256(body).hexdigest()
            wait_until(lambda: not partial.exists())
        return Answer(response.status, response.reason, dict(response.headers), body, whole)


@dataclass(frozen=True)
class Answer:
    status: int
    reason: str
    headers: dict[str, str]
    body: bytes
    whole: bool


@dataclass
class AptClient:
    """apt-get with its own directories; `sources`: lines of sources.list."""

    root: Path
    sources: Sequence[str]
    proxy: str
    inside: Sequence[str] = ()
    more: Sequence[str] = ()

    def __post_init__(self) -> None:
        for part in ("state/lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
            (self.root / part).mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        (self.root / "apt.conf").write_text('Dir::Etc::parts "/dev/null";\n')
        (self.root / "etc/sources.list").write_text("\n".join(self.sources) + "\n")

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        root = self.root
        options = [
            f"Dir={root}", f"Dir::State={root}/state", f"Dir::State::status={root}/status",
            f"Dir::Cache={root}/cache", f"Dir::Etc={root}/etc", "Dir::Log=/dev/null",
            "APT::Architecture=amd64", "APT::Architectures=amd64", "APT::Sandbox::User=",
            "Debug::NoLocking=true", "Acquire::Languages=none", f"Acquire::http::Proxy={self.proxy}",
            "Acquire::Retries=3", "Acquire::Retries::Delay=false", "APT::Update::Error-Mode=any", *self.more,
        ]  # fmt: skip
        command = [*self.inside, "apt-get", "-q", "-y", *(word for each in options for word in ("-o", each)), *words]
        env = {**os.environ, "APT_CONFIG": str(self.root / "apt.conf"), "LC_ALL": "C.UTF-8"}
        for name in ("http_proxy", "https_proxy"):
            env.pop(name, None)
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def update(self, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("update", check=check)

    def download(self, *names: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Everything that installing them needs; apt checks it."""
        return self.run("--download-only", "install", *names, check=check)

    def debs(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.root / "cache/archives").glob("*.deb")}


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds * SCALE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
