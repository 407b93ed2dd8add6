"""Peers on the local network, by DNS-SD over multicast DNS (RFC 6762, RFC 6763): `_hostos-mirror._tcp`.

The TXT record holds a number of this run, to know oneself by, and the cluster's tag: members of another
cluster are left alone. `avahi-browse -r _hostos-mirror._tcp` shows who is there.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from typing import Any

from zeroconf import InterfaceChoice, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from hostos.mirror.cluster import Cluster
from hostos.mirror.peers import Peers

SERVICE = "_hostos-mirror._tcp.local."
ASK_MS = 3000
ANY = ("0.0.0.0", "::")


class Discovery:
    """`host`, `port`: where this one serves peers; port 0 if it doesn't, and only looks for others."""

    def __init__(self, host: str, port: int, cluster: Cluster, peers: Peers, log: Callable[[str], None]) -> None:
        self.host, self.port, self.cluster, self.peers, self.log = host, port, cluster, peers, log
        self.me = secrets.token_hex(8)
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._asking: set[asyncio.Task[None]] = set()
        self._names: dict[str, list[tuple[str, int]]] = {}

    async def start(self) -> None:
        """Raises OSError where multicast can't be used."""
        interfaces: Any = InterfaceChoice.All if not self.host or self.host in ANY else [self.host]
        self._zeroconf = AsyncZeroconf(interfaces=interfaces, ip_version=IPVersion.All if ":" in self.host else None)
        if self.port:
            await self._zeroconf.async_register_service(self._service(), allow_name_change=True)
        self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE, handlers=[self._changed])

    def _service(self) -> AsyncServiceInfo:
        addresses = local_addresses() if self.host in ANY else [self.host]
        return AsyncServiceInfo(
            SERVICE,
            f"{self.me}.{SERVICE}",
            port=self.port,
            parsed_addresses=addresses,
            properties={"id": self.me, "cluster": self.cluster.tag},
            server=f"hostos-{self.me}.local.",
        )

    def _changed(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            for host, port in self._names.pop(name, []):
                self.peers.remove(host, port)
        elif len(self._asking) < 32 and not name.startswith(f"{self.me}."):
            task = asyncio.create_task(self._ask(zeroconf, service_type, name))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask(self, zeroconf: Zeroconf, service_type: str, name: str) -> None:
        info = AsyncServiceInfo(service_type, name)
        if not await info.async_request(zeroconf, ASK_MS) or not info.port:
            return
        said = info.properties
        if said.get(b"id") == self.me.encode() or said.get(b"cluster") != self.cluster.tag.encode():
            return
        found = [(host, info.port) for host in info.parsed_addresses(IPVersion.V4Only)[:2]]
        found = found or [(host, info.port) for host in info.parsed_addresses(IPVersion.V6Only)[:1]]
        if len(self._names) < 256:
            self._names[name] = found
            for host, port in found:
                self.peers.add(host, port, "lan")

    async def close(self) -> None:
        for task in self._asking:
            task.cancel()
        if self._browser:
            await self._browser.async_cancel()
        if self._zeroconf:
            await self._zeroconf.async_unregister_all_services()
            await self._zeroconf.async_close()


def local_addresses() -> list[str]:
    """This machine's IPv4 addresses that others can reach."""
    import psutil

    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    return found or ["127.0.0.1"]
