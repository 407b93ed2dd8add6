"""The seed's libtorrent session: where it listens, for whom, and what it leaves alone."""

from __future__ import annotations

import ipaddress
import time
from typing import Any

import libtorrent
import psutil

from hostos import __version__
from hostos.errors import UserError
from hostos.hostsystem import who_listens
from hostos.live.swarm_settings import PEER_ID, SwarmSettings, limit_everyone

LISTEN_DEADLINE = 5.0
"""Seconds libtorrent gets to open its listening socket."""


def session(host: str, port: int, swarm: SwarmSettings) -> Any:
    """A libtorrent session that only serves."""
    address = f"[{host}]" if ":" in host else host
    categories = libtorrent.alert.category_t
    settings: Any = {
        "listen_interfaces": f"{address}:{port}",
        # The port that was asked for, or an error.
        "max_retry_port_bind": 0,
        "listen_system_port_fallback": False,
        **swarm.settings(),
        "enable_upnp": False,
        "enable_natpmp": False,
        # In local discovery it is the one who has something that calls back.
        "enable_outgoing_tcp": swarm.discovers,
        "enable_outgoing_utp": False,
        # Over loopback uTP took 5.7 s for what TCP carries in 0.6 s.
        "enable_incoming_utp": False,
        "announce_to_all_trackers": False,
        # Behind user networking every guest has the same address.
        "allow_multiple_connections_per_ip": True,
        "close_redundant_connections": False,
        "unchoke_slots_limit": -1,
        "active_seeds": -1,
        "active_limit": -1,
        "send_buffer_watermark": 4 << 20,
        "user_agent": f"hostos/{__version__}",
        "peer_fingerprint": PEER_ID,
        "alert_mask": categories.error_notification | categories.status_notification,
    }
    result = libtorrent.session(settings)
    limit_everyone(result)
    return result


class Door:
    """Where the seed listens besides its own address, and for whom.

    A machine on a bridge can't reach this host's loopback. For it the seed opens its port on the
    address this host has on that bridge, and turns away everybody there but the machines named.
    """

    def __init__(self, session: Any, host: str, port: int) -> None:
        self.session = session
        self.host = host
        self.port = port
        self.hosts: list[str] = []
        self.guests: set[str] = set()

    def admit(self, host: str, guest: str) -> None:
        """Raises UserError if `host` can't be listened on, ValueError for what is no IPv4 address."""
        host, guest = str(ipaddress.IPv4Address(host)), str(ipaddress.IPv4Address(guest))
        own = ipaddress.ip_address(self.host)
        self.guests.add(guest)
        self._turn_away_others()
        if own.is_unspecified or host in (self.host, *self.hosts):
            return
        self.session.apply_settings({"listen_interfaces": self._interfaces(*self.hosts, host)})
        deadline = time.monotonic() + LISTEN_DEADLINE
        while not _accepts(host, self.port):
            if time.monotonic() > deadline:
                self.session.apply_settings({"listen_interfaces": self._interfaces(*self.hosts)})
                self.guests.discard(guest)
                self._turn_away_others()
                raise UserError(f"the seed can't listen on {host}:{self.port}", f"is that port taken? {who_listens()}")
            time.sleep(0.02)
        self.hosts.append(host)

    def _interfaces(self, *more: str) -> str:
        own = f"[{self.host}]" if ":" in self.host else self.host
        return ",".join(f"{host}:{self.port}" for host in (own, *more))

    def _turn_away_others(self) -> None:
        # Whoever starts it with another address wants others to reach it there.
        if not ipaddress.ip_address(self.host).is_loopback:
            return
        rules = libtorrent.ip_filter()
        rules.add_rule("0.0.0.0", "255.255.255.255", 1)
        for address in ("127.0.0.0/8", *self.guests):
            network = ipaddress.ip_network(address)
            rules.add_rule(str(network[0]), str(network[-1]), 0)
        self.session.set_ip_filter(rules)


def _accepts(host: str, port: int) -> bool:
    """Whether this process listens there (its sockets are asked, nothing is sent)."""
    found = psutil.Process().net_connections("tcp4")
    return any(each.status == psutil.CONN_LISTEN and each.laddr == (host, port) for each in found)


def listen(host: str, port: int, swarm: SwarmSettings) -> tuple[Any, int]:
    """A session that really listens, and its port. `port` 0: any. Raises UserError."""
    result = session(host, port, swarm)
    deadline = time.monotonic() + LISTEN_DEADLINE
    reason = f"libtorrent opened nothing within {LISTEN_DEADLINE:.0f} s"
    tcp = libtorrent.socket_type_t.tcp
    while (left := deadline - time.monotonic()) > 0:
        result.wait_for_alert(int(left * 1000) + 1)
        for alert in result.pop_alerts():
            if isinstance(alert, libtorrent.listen_succeeded_alert) and alert.socket_type == tcp:
                return result, int(alert.port)
            if isinstance(alert, libtorrent.listen_failed_alert) and alert.socket_type == tcp:
                reason, deadline = alert.error.message(), 0.0
    raise UserError(f"the seed can't listen on {host}:{port}: {reason}", "hostos seed start --listen ADDRESS:PORT")
