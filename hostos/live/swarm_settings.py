"""How a libtorrent session deals with strangers: encryption, rates, and whether it looks for peers by itself.

The same for the client in the guest and for the host's seed. By default nobody is told or asked anything
but the peers that were named, and nothing crosses a wire unencrypted.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import libtorrent as lt

from hostos.errors import UserError
from hostos.live.torrents import parse_peer

Encryption = Literal["required", "preferred", "off"]

PUBLIC_NODES = ("dht.libtorrent.org:25401", "router.bittorrent.com:6881")
"""Nodes through which the public DHT is entered, unless others are named. Used only with `public`."""
MOST_RATE = (1 << 31) - 1

PEER_ID = "-HO0100-"
"""How the peer IDs of seed and client begin: version 0.1.0, in the style that BEP 20 describes."""
REQUESTS = 96
"""Blocks of 16 KiB that a peer may have asked us for and not got yet; it is told, and keeps to it (BEP 10, "reqq").
1.5 MiB keep 60 Mbit/s at 200 ms full; with libtorrent's 2000 one client's prefetch would be far ahead of what another
waits for."""

# Message stream encryption: libtorrent's pe_forced, pe_enabled, pe_disabled; then what may follow its
# handshake: 2 is RC4 alone, 3 plain text, too.
_POLICIES: dict[Encryption, tuple[int, int]] = {"required": (0, 2), "preferred": (1, 3), "off": (2, 3)}


@dataclass(frozen=True)
class SwarmSettings:
    """`encryption`: whether connections must, may or can't be encrypted; `download_limit`, `upload_limit`: bytes
    a second (0: none); `lan`: local service discovery (BEP 14); `public`: the DHT (BEP 5), entered through
    `nodes` (`HOST:PORT`; none: the public ones). Raises UserError.
    """

    encryption: Encryption = "required"
    download_limit: int = 0
    upload_limit: int = 0
    lan: bool = False
    public: bool = False
    nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.encryption not in get_args(Encryption):
            raise UserError(f"encryption {str(self.encryption)[:40]!r} is not one of {', '.join(get_args(Encryption))}")
        for limit in (self.download_limit, self.upload_limit):
            if type(limit) is not int or not 0 <= limit <= MOST_RATE:
                raise UserError(f"not a rate limit: {str(limit)[:40]}", "bytes a second, 0 for none")
        object.__setattr__(self, "nodes", tuple(parse_peer(node) for node in self.nodes))

    @property
    def discovers(self) -> bool:
        """Whether peers may be found that nobody named."""
        return self.lan or self.public

    def settings(self) -> dict[str, Any]:
        """As libtorrent takes them."""
        policy, level = _POLICIES[self.encryption]
        nodes = self.nodes or PUBLIC_NODES
        found: dict[str, Any] = {
            "in_enc_policy": policy,
            "out_enc_policy": policy,
            "allowed_enc_level": level,
            "prefer_rc4": True,
            "max_allowed_in_request_queue": REQUESTS,
            "download_rate_limit": self.download_limit,
            "upload_rate_limit": self.upload_limit,
            "enable_lsd": self.lan,
            "local_service_announce_interval": 60,
            "enable_dht": self.public,
            # Named even when it is off: libtorrent's default is never to be asked by accident.
            "dht_bootstrap_nodes": ",".join(nodes) if self.public else "",
        }
        if self.public and all(_private(node) for node in nodes):
            # A DHT of one's own: all of its nodes may well be neighbours.
            found |= {"dht_restrict_routing_ips": False, "dht_restrict_search_ips": False}
        return found

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "nodes": list(self.nodes)}

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> SwarmSettings:
        """From what `to_dict` gives. Raises UserError."""
        known = {"encryption": str, "download_limit": int, "upload_limit": int, "lan": bool, "public": bool}
        for name, value in fields.items():
            if name == "nodes":
                if not isinstance(value, list) or not all(isinstance(node, str) for node in value) or len(value) > 64:
                    raise UserError("swarm settings: 'nodes' is not a list of addresses")
            elif name not in known or type(value) is not known[name]:
                raise UserError(f"swarm settings: {name[:40]!r} is not known, or not {str(value)[:40]!r}")
        return cls(**{**fields, "nodes": tuple(fields.get("nodes", ()))})


def _private(node: str) -> bool:
    try:
        return not ipaddress.ip_address(node.rpartition(":")[0].strip("[]")).is_global
    except ValueError:
        return False


def limit_everyone(session: Any) -> None:
    """Have the rate limits hold for all peers: libtorrent exempts those on local networks otherwise."""
    everyone = lt.ip_filter()
    limited = 1 << lt.session.global_peer_class_id
    everyone.add_rule("0.0.0.0", "255.255.255.255", limited)
    everyone.add_rule("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", limited)
    session.set_peer_class_filter(everyone)
