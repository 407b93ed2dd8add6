"""How strangers are dealt with, from options and settings: for `container boot` and `seed start` alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from hostos.errors import UserError

Command = TypeVar("Command", bound=Callable[..., Any])


def swarm_options(command: Command) -> Command:
    """--lan, --public, --upload-limit, --encryption; `swarm_settings` goes by them."""
    for option in (
        click.option("--encryption", type=click.Choice(["required", "preferred", "off"]),
                     help="Of connections between peers.  [default: required]"),
        click.option("--upload-limit", metavar="RATE", help="Bytes a second, e.g. 500K or 2M.  [default: none]"),
        click.option("--public", is_flag=True, help="Find peers, and be found, through the DHT."),
        click.option("--lan", is_flag=True, help="Find peers, and be found, on the local network."),
    ):  # fmt: skip
        command = option(command)
    return command


def swarm_settings(
    *,
    lan: bool,
    public: bool,
    encryption: str | None,
    upload_limit: str | None = None,
    download_limit: str | None = None,
) -> Any:
    """A SwarmSettings: what was typed, else what the settings say. Raises UserError."""
    from hostos import config
    from hostos.live.swarm_settings import SwarmSettings

    discovery = config.get("swarm.discovery")
    return SwarmSettings(
        encryption=encryption or config.get("swarm.encryption"),  # type: ignore[arg-type]
        download_limit=parse_rate(download_limit, "--download-limit") if download_limit else 0,
        upload_limit=parse_rate(upload_limit, "--upload-limit") if upload_limit else 0,
        lan=lan or discovery in ("lan", "public"),
        public=public or discovery == "public",
        nodes=tuple(config.get("swarm.dht_nodes") or ()),
    )


def parse_rate(text: str, option: str = "--upload-limit") -> int:
    """Bytes per second from `500K`, `2M`, `1G` (powers of 1024) or a plain number. Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,9})([KMG]?)", text.strip().upper())
    rate = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else 0
    if not 0 < rate < 1 << 31:
        raise UserError(f"{option} {text!r} is not a rate", f"e.g. {option} 500K (bytes per second)")
    return rate
