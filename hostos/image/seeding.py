"""Starts, asks and stops the background seed (`hostos.image.seed`).

Whether it runs is never written down: it runs if it holds its lock, and it is well if it answers.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hostos.errors import UserError, failure
from hostos.live.swarm_settings import SwarmSettings
from hostos.locking import exclusive
from hostos.paths import data_dir, private_dir, runtime_dir, state_dir

DEFAULT_HOST = "127.0.0.1"
START_DEADLINE = 20.0
"""Seconds until a new seed must listen and answer."""
STOP_DEADLINE = 10.0
ANSWER_DEADLINE = 10.0
DYING_DEADLINE = 2.0
"""Seconds that a killed seed may take to let go of its lock."""

SCHEMA = 1


@dataclass(frozen=True)
class Place:
    """Files of the seed: `directory` for its state, `socket` for control."""

    directory: Path
    socket: Path

    @classmethod
    def default(cls) -> Place:
        return cls(state_dir() / "seed", runtime_dir() / "seed.sock")

    @property
    def running(self) -> Path:
        """Locked as long as a seed lives."""
        return self.directory / "running.lock"

    @property
    def starting(self) -> Path:
        """Locked by whoever starts or stops it."""
        return self.directory / "starting.lock"

    @property
    def info(self) -> Path:
        """Process id and start time, for a seed that doesn't answer."""
        return self.directory / "seed.json"

    @property
    def port(self) -> Path:
        """The port it had last, so that links with its address stay good."""
        return self.directory / "port"

    @property
    def log(self) -> Path:
        return self.directory / "seed.log"


@dataclass(frozen=True)
class SeedInfo:
    """A running seed: where it listens, its process, and all that it says (`status`)."""

    host: str
    port: int
    pid: int
    details: dict[str, Any]

    @property
    def address(self) -> str:
        """`HOST:PORT` for a magnet link or `--peer` on this host."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def start(listen: str | None = None, *, swarm: SwarmSettings | None = None, place: Place | None = None) -> SeedInfo:
    """Start the seed unless it runs; returns when it listens.

    `listen`: `ADDRESS[:PORT]`, default 127.0.0.1 (every address if others are to find it) with the last port
    or any; `swarm`: how it deals with strangers. Raises UserError if the address can't be had
    or another seed runs elsewhere, a failure if it doesn't listen within `START_DEADLINE` seconds.
    """
    place = place or Place.default()
    wanted = swarm or SwarmSettings()
    host, port = parse_listen(listen) if listen else ("0.0.0.0" if wanted.discovers else DEFAULT_HOST, None)
    private_dir(place.directory)
    private_dir(place.socket.parent)
    with exclusive(place.starting, START_DEADLINE + STOP_DEADLINE, "another hostos is starting or stopping the seed"):
        if (running := status(place)) is not None:
            same_place = listen is None or (host == running.host and port in (None, running.port))
            if same_place and (swarm is None or wanted.to_dict() == running.details.get("swarm")):
                return running
            raise UserError(
                f"the seed already runs on {running.host}:{running.port}, perhaps with other settings",
                "hostos seed stop, then start it again",
            )
        if not _wait_unlocked(place, DYING_DEADLINE):
            raise failure(
                "a seed runs but doesn't answer", f"hostos seed stop, then start it again; its log: {place.log}"
            )
        return _spawn(place, host, port, wanted)


def _spawn(place: Place, host: str, port: int | None, swarm: SwarmSettings) -> SeedInfo:
    command = [sys.executable, "-m", "hostos.image.seed", "--host", host, "--swarm", json.dumps(swarm.to_dict())]
    command += ["--store", str(data_dir()), "--state", str(place.directory), "--socket", str(place.socket)]
    if port is not None:
        command += ["--port", str(port)]
    if place.log.exists() and place.log.stat().st_size > 1 << 20:
        place.log.replace(place.log.with_suffix(".log.1"))
    with place.log.open("ab") as log:
        began = log.tell()
        try:
            # Ends when the seed is ready, which then is nobody's child (see seed.detach).
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", timeout=START_DEADLINE
            ).returncode
        except subprocess.TimeoutExpired:
            raise failure(f"the seed was not ready within {START_DEADLINE:.0f} s", f"look at {place.log}") from None
    running = status(place) if code == 0 else None
    if running is None:
        raise _early_exit(place, began, code)
    return running


def _early_exit(place: Place, began: int, code: int) -> UserError:
    with place.log.open("rb") as log:
        log.seek(began)
        lines = log.read().decode(errors="replace").strip().splitlines()
    for line in lines:
        _, found, reason = line.partition(" error: ")
        if found:
            return UserError(reason, "give another with --listen ADDRESS:PORT, or none for any free port")
    return failure(
        f"the seed ended with status {code}: {lines[-1] if lines else 'it said nothing'}", f"look at {place.log}"
    )


def ensure_started(swarm: SwarmSettings | None = None) -> SeedInfo:
    """The running seed, whatever its settings; if there is none it is started, on loopback."""
    return status() or start(f"{DEFAULT_HOST}", swarm=swarm)


def status(place: Place | None = None) -> SeedInfo | None:
    """The running seed; None if there is none or it doesn't answer."""
    answer = request("status", place)
    if answer is None:
        return None
    return SeedInfo(answer["host"], answer["port"], answer["pid"], answer)


def reload(place: Place | None = None) -> bool:
    """Have a running seed look at the store now; returns whether one did."""
    return request("reload", place) is not None


def admit(host: str, guest: str, place: Place | None = None) -> None:
    """Have the running seed listen on `host` too, an address of this host, for the peer `guest` alone.

    For a machine that has an address of its own: this host's loopback is out of its reach. It holds
    as long as the seed runs. Raises a failure if the seed can't listen there.
    """
    request("admit", place, host=host, guest=guest)


def request(operation: str, place: Place | None = None, **fields: str) -> dict[str, Any] | None:
    """Ask the seed; None if none answers. Raises a failure for an answer that isn't one."""
    place = place or Place.default()
    data = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(ANSWER_DEADLINE)
        try:
            client.connect(str(place.socket))
            client.sendall(json.dumps({"schema": SCHEMA, "op": operation, **fields}).encode() + b"\n")
            while not data.endswith(b"\n"):
                if not (more := client.recv(1 << 16)):
                    return None
                data += more
        except OSError:
            return None
    answer = json.loads(data)
    if not answer.get("ok"):
        raise failure(f"the seed: {answer.get('error')}", "hostos seed stop, then start it again")
    return dict(answer)


def stop(place: Place | None = None) -> bool:
    """Stop the seed, kindly, then firmly; returns whether there was one. Raises a failure if it
    can't be stopped."""
    place = place or Place.default()
    if not place.directory.is_dir():
        return False
    with exclusive(place.starting, START_DEADLINE + STOP_DEADLINE, "another hostos is starting or stopping the seed"):
        if not _locked(place.running):
            place.socket.unlink(missing_ok=True)
            place.info.unlink(missing_ok=True)
            return False
        process = _process(place)
        request("stop", place)
        for action in (None, psutil.Process.terminate, psutil.Process.kill):
            if action is not None and process is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    action(process)
            deadline = time.monotonic() + STOP_DEADLINE / 2
            while time.monotonic() < deadline:
                if not _locked(place.running) and _gone(process):
                    return True
                time.sleep(0.02)
    raise failure("the seed can't be stopped", f"it holds {place.running}: fuser {place.running}")


def _process(place: Place) -> psutil.Process | None:
    """The seed's process, if the one with its number is still the same."""
    try:
        info = json.loads(place.info.read_text())
        process = psutil.Process(info["pid"])
        return process if abs(process.create_time() - info["started"]) < 0.1 else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def _wait_unlocked(place: Place, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _locked(place.running):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _gone(process: psutil.Process | None) -> bool:
    try:
        return process is None or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _locked(path: Path) -> bool:
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def parse_listen(text: str) -> tuple[str, int | None]:
    """`ADDRESS[:PORT]`; IPv6 addresses with a port in brackets. Raises UserError."""
    host, port = text, None
    if text.startswith("[") or text.count(":") == 1:
        host, _, digits = text.rpartition(":") if not text.endswith("]") else (text, "", "")
        if digits or not text.endswith("]"):
            if not (digits.isascii() and digits.isdigit() and 0 < int(digits) < 65536):
                raise UserError(f"--listen {text!r}: no port number after the colon", "e.g. --listen 127.0.0.1:6881")
            port = int(digits)
        host = host.removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(host)), port
    except ValueError:
        raise UserError(
            f"--listen {text!r} is not ADDRESS[:PORT]", "give an IP address of this host, e.g. --listen 192.168.1.5"
        ) from None
