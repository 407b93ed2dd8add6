"""Starts, asks and stops the background seed (`hostos.image.seed`).

Whether it runs is never written down: it runs if it holds its lock, and it is well if it answers
(`hostos.background`).
"""

from __future__ import annotations

import ipaddress
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostos import background
from hostos.errors import UserError
from hostos.live.swarm_settings import SwarmSettings
from hostos.paths import data_dir, private_dir, runtime_dir, state_dir

DEFAULT_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Place(background.Place):
    """Files of the seed."""

    noun: str = "seed"

    @classmethod
    def default(cls) -> Place:
        return cls(state_dir() / "seed", runtime_dir() / "seed.sock")

    @property
    def port(self) -> Path:
        """The port it had last, so that links with its address stay good."""
        return self.directory / "port"


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


def start(
    listen: str | None = None,
    *,
    swarm: SwarmSettings | None = None,
    only: Sequence[str] = (),
    place: Place | None = None,
) -> SeedInfo:
    """Start the seed unless it runs; returns when it listens.

    `listen`: `ADDRESS[:PORT]`, default 127.0.0.1 (every address if others are to find it) with the last port
    or any; `swarm`: how it deals with strangers; `only`: hashes of the images to offer (none: all).
    Raises UserError if the address can't be had or another seed runs elsewhere, a failure if it doesn't listen
    within `background.START_DEADLINE` seconds.
    """
    place = place or Place.default()
    wanted = swarm or SwarmSettings()
    host, port = parse_listen(listen) if listen else ("0.0.0.0" if wanted.discovers else DEFAULT_HOST, None)
    private_dir(place.directory)
    private_dir(place.socket.parent)
    with background.changing(place):
        if (running := status(place)) is not None:
            same_place = listen is None or (host == running.host and port in (None, running.port))
            same_images = not only or sorted(only) == running.details.get("only")
            if same_place and same_images and (swarm is None or wanted.to_dict() == running.details.get("swarm")):
                return running
            raise UserError(
                f"the seed already runs on {running.host}:{running.port}, perhaps with other settings",
                "hostos seed stop, then start it again",
            )
        command = [sys.executable, "-m", "hostos.image.seed", "--host", host, "--swarm", json.dumps(wanted.to_dict())]
        command += ["--store", str(data_dir()), "--state", str(place.directory), "--socket", str(place.socket)]
        if port is not None:
            command += ["--port", str(port)]
        command += [word for image in only for word in ("--only", image)]
        background.spawn(place, command, hint="give another with --listen ADDRESS:PORT, or none for any free port")
        running = status(place)
    if running is None:
        raise background.vanished(place)
    return running


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
    return background.request(place or Place.default(), operation, **fields)


def stop(place: Place | None = None) -> bool:
    """Stop the seed, kindly, then firmly; returns whether there was one. Raises a failure if it
    can't be stopped."""
    return background.stop(place or Place.default())


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
