"""How the cache runs. Given by options of `hostos mirror start`, else by the configuration file."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostos.errors import UserError

PORT = 3143
"""Of the proxy, on loopback."""
PEER_PORT = 3144
"""Where peers are served, if they are."""


_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*")


@dataclass(frozen=True)
class Settings:
    """Rates in bytes per second and sizes in bytes; 0 means no limit.

    `listen`: ADDRESS:PORT of the proxy, for clients. `share`: ADDRESS:PORT at which peers get files,
    empty: not at all. `peers`: HOST:PORT of others. `lan`: find and be found on the local network.
    `dht`: HOST:PORT of nodes by which to join a DHT, empty: none. `cluster_key`: file with the key
    that members share. `contribute`: packages to fetch a day that nobody here asked for.
    """

    listen: tuple[str, ...] = (f"127.0.0.1:{PORT}", f"[::1]:{PORT}")
    share: str = ""
    peers: tuple[str, ...] = ()
    lan: bool = False
    dht: tuple[str, ...] = ()
    cluster_key: str = ""
    size: int = 20 << 30
    keep_days: int = 90
    upload_limit: int = 0
    download_limit: int = 0
    offline: bool = False
    prefetch: bool = False
    contribute: int = 0
    proxy: str = ""
    """By which the mirrors are reached, if by one: http://HOST:PORT."""

    def to_json(self) -> str:
        return json.dumps({"schema": 1, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Settings:
        content: dict[str, Any] = json.loads(text)
        if content.pop("schema") != 1:
            raise ValueError("settings of another schema")
        for name in ("listen", "peers", "dht"):
            content[name] = tuple(content[name])
        return cls(**content)


def parse_address(text: str, option: str, default_port: int | None = None) -> tuple[str, int]:
    """`HOST:PORT` (IPv6 in brackets); without a port `default_port`. Raises UserError."""
    host, colon, digits = text.rpartition(":")
    if not colon or text.endswith("]") or (":" in host and not host.startswith("[")):
        host, digits = text, str(default_port or "")
    host = host.removeprefix("[").removesuffix("]")
    if not _HOST.fullmatch(host) or not (digits.isascii() and digits.isdigit() and 0 < int(digits) < 65536):
        raise UserError(f"{option} {text!r} is not ADDRESS:PORT", f"e.g. {option} 192.168.1.5:{default_port or PORT}")
    return host, int(digits)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_key(path: str) -> bytes:
    """The members' key: the file's content without white space around it. Raises UserError."""
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise UserError(f"the cluster key {path} can't be read: {error.strerror}", "openssl rand -hex 32") from None
    if len(key) < 16:
        raise UserError(f"the cluster key {path} is shorter than 16 bytes", f"make one: openssl rand -hex 32 > {path}")
    return key
