"""Two network namespaces and a link of a given rate between them (needs root)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from hostos.errors import UserError

# RFC 2544 sets these addresses aside for benchmarks.
SEED, CLIENT = "198.18.0.1", "198.18.0.2"


@dataclass(frozen=True)
class Link:
    """`seed` and `client` are the names of the namespaces."""

    seed: str
    client: str

    def shape(self, mbit: float | None) -> None:
        """Limit what the seed sends to `mbit` Mbit/s (None: not at all). The queue holds 50 ms."""
        _shape(self.seed, mbit)

    def enter(self, namespace: str) -> list[str]:
        """What to put before a command so that it runs there."""
        return ["nsenter", f"--net=/run/netns/{namespace}"]


def _shape(namespace: str, mbit: float | None) -> None:
    tc = ["ip", "netns", "exec", namespace, "tc", "qdisc"]
    subprocess.run([*tc, "del", "dev", "eth0", "root"], stderr=subprocess.DEVNULL, check=False)
    if mbit is not None:
        limits = ["tbf", "rate", f"{mbit}mbit", "burst", "32k", "latency", "50ms"]
        subprocess.run([*tc, "add", "dev", "eth0", "root", *limits], check=True)


@contextmanager
def link() -> Iterator[Link]:
    """The namespaces exist as long as the context. Raises `UserError` without root or iproute2."""
    if os.geteuid() != 0:
        raise UserError(
            "the benchmark makes network namespaces, for which it must be root", "sudo -E .venv/bin/invoke bench.live"
        )
    for tool in ("ip", "tc", "nsenter", "systemd-nspawn"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not installed", "./bootstrap")
    mark = os.getpid()
    seed, client = f"hostos-s{mark}", f"hostos-c{mark}"
    with ExitStack() as stack:
        for name in (seed, client):
            _ip("netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", "eth0", "netns", seed, "type", "veth", "peer", "name", "eth0", "netns", client)
        for name, address in ((seed, SEED), (client, CLIENT)):
            _ip("-n", name, "address", "add", f"{address}/30", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield Link(seed, client)


CROWD = "198.18.4"


@dataclass(frozen=True)
class Crowd:
    """A seed, 198.18.4.1, and clients on one network, each in the namespace of that name."""

    seed: str
    clients: tuple[str, ...]

    @property
    def address(self) -> str:
        return f"{CROWD}.1"

    def enter(self, namespace: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{namespace}"]

    def shape(self, seed: float | None, clients: float | None) -> None:
        """Limit what each of them sends, Mbit/s (None: not at all). The queue holds 50 ms."""
        _shape(self.seed, seed)
        for name in self.clients:
            _shape(name, clients)


@contextmanager
def crowd(clients: int) -> Iterator[Crowd]:
    """The namespaces exist as long as the context."""
    mark = os.getpid()
    hub = f"hostos-h{mark}"
    names = [f"hostos-n{mark}-{number}" for number in range(clients + 1)]
    with ExitStack() as stack:
        for name in (hub, *names):
            _ip("netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "net", "type", "bridge")
        _ip("-n", hub, "link", "set", "net", "up")
        for number, name in enumerate(names):
            port = f"p{number}"
            _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", hub, "link", "set", port, "master", "net", "up")
            _ip("-n", name, "address", "add", f"{CROWD}.{number + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield Crowd(names[0], tuple(names[1:]))


def received(namespace: str) -> int:
    """Bytes that arrived at the namespace's interface so far."""
    return _counted(namespace, "rx_bytes")


def sent(namespace: str) -> int:
    """Bytes that left it."""
    return _counted(namespace, "tx_bytes")


def _counted(namespace: str, what: str) -> int:
    path = f"/sys/class/net/eth0/statistics/{what}"
    done = subprocess.run(["ip", "netns", "exec", namespace, "cat", path], capture_output=True, check=True)
    return int(done.stdout)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
