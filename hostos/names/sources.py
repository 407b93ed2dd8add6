"""Where records come from: web servers of their owners (`hostos name serve` is one), and a DHT one chose.

Whatever comes is only a claim; `resolve` proves it.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha512
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostos.errors import UserError, failure
from hostos.live.torrents import parse_peer
from hostos.names.record import MAX_RECORD

PATH = "/hostos/names"
DEADLINE = 5.0
"""Seconds a source has to answer."""
PUT_DEADLINE = 40.0
"""Seconds for storing something in a DHT; nodes that are gone cost five each."""


def parse_source(text: str) -> str:
    """An http(s) URL without query, its final slash gone. Raises UserError."""
    try:
        url = urlsplit(text.strip())
        good = url.scheme in ("http", "https") and url.hostname and not url.query and not url.fragment and url.port != 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"not where records can be: {text[:80]!r}", "give a URL, e.g. --at http://192.168.1.5:6880")
    return text.strip().rstrip("/")


def from_web(source: str, key: str, name: str) -> bytes | None:
    """`SOURCE/hostos/names/KEY/NAME`; None if it isn't there. Raises OSError."""
    url = urlsplit(source)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(str(url.hostname), url.port, timeout=DEADLINE)
    try:
        connection.request("GET", f"{url.path}{PATH}/{key}/{name}", headers={"Connection": "close"})
        answer = connection.getresponse()
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise OSError(f"status {answer.status}")
        return answer.read(MAX_RECORD + 2)
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP: {type(error).__name__}") from None
    finally:
        connection.close()


def ask_all(questions: Sequence[tuple[str, Callable[[], bytes | None]]]) -> Iterator[tuple[str, bytes | None, str]]:
    """Ask all at once: who, what they said (None: nothing), and why not."""
    if not questions:
        return
    with ThreadPoolExecutor(len(questions)) as pool:
        running = [(who, pool.submit(question)) for who, question in questions]
        for who, future in running:
            try:
                yield who, future.result(), ""
            except OSError as error:
                yield who, None, error.strerror or str(error)
            except UserError as error:
                yield who, None, error.message


# --- the DHT ----------------------------------------------------------------------------------------


class Dht:
    """A member of the DHT that `nodes` (`HOST:PORT`) belong to, for as long as the context. Nobody else is asked."""

    def __init__(self, nodes: tuple[str, ...], listen: str = "0.0.0.0:0") -> None:
        import libtorrent

        self._lt = libtorrent
        nodes = tuple(parse_peer(node) for node in nodes)
        local = all(node.startswith("127.") for node in nodes)
        self.session: Any = libtorrent.session(
            {
                "listen_interfaces": "127.0.0.1:0" if local and listen == "0.0.0.0:0" else listen,
                "enable_dht": True,
                "enable_lsd": False,
                "enable_upnp": False,
                "enable_natpmp": False,
                "dht_bootstrap_nodes": ",".join(nodes),
                # For networks where several nodes have one address: a laboratory, a home.
                "dht_restrict_routing_ips": not local,
                "dht_restrict_search_ips": not local,
                "dht_prefer_verified_node_ids": not local,
                "dht_enforce_node_id": False,
                "alert_mask": libtorrent.alert.category_t.dht_notification
                | libtorrent.alert.category_t.error_notification
                | libtorrent.alert.category_t.status_notification,
            }
        )
        for node in nodes:
            host, _, port = node.rpartition(":")
            self.session.add_dht_node((host.strip("[]"), int(port)))

    def __enter__(self) -> Dht:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.pause()

    def get(self, key: str, name: str, deadline: float = 2 * DEADLINE) -> bytes | None:
        """The value with the highest number that was found; None if there was none in time."""
        found: tuple[int, bytes] | None = None
        until = time.monotonic() + deadline
        while time.monotonic() < until:
            self.session.dht_get_mutable_item(bytes.fromhex(key), name.encode())
            for alert in self._alerts(min(until, time.monotonic() + DEADLINE)):
                if not isinstance(alert, self._lt.dht_mutable_item_alert):
                    continue
                item: Any = alert.item
                value = item.get("value") if isinstance(item, dict) else item
                if isinstance(value, bytes) and value and (found is None or alert.seq > found[0]):
                    found = alert.seq, value
                # One comes for each better value, and at the end an authoritative one.
                if alert.authoritative:
                    break
            if found is not None:
                return found[1]
            time.sleep(0.2)  # its own table of nodes may still have been empty
        return None

    def put(self, key: Ed25519PrivateKey, name: str, data: bytes, deadline: float = PUT_DEADLINE) -> int:
        """Store `data`; on how many nodes. Raises a failure if no node took it."""
        public = key.public_key().public_bytes_raw()
        until = time.monotonic() + deadline
        while time.monotonic() < until:
            self.session.dht_put_mutable_item(expanded(key), public, data, name.encode())
            for alert in self._alerts(min(until, time.monotonic() + PUT_DEADLINE / 2)):
                if isinstance(alert, self._lt.dht_put_alert):
                    if alert.num_success:
                        return int(alert.num_success)
                    break
            time.sleep(0.2)
        raise failure("no node of the DHT took the record", "are its nodes reachable? hostos name dht HOST:PORT…")

    def _alerts(self, until: float) -> Iterator[Any]:
        while (left := until - time.monotonic()) > 0:
            self.session.wait_for_alert(int(left * 1000) + 1)
            yield from self.session.pop_alerts()


def expanded(key: Ed25519PrivateKey) -> bytes:
    """The form libtorrent signs with: SHA-512 of the seed, clamped (RFC 8032 §5.1.5)."""
    digest = bytearray(sha512(key.private_bytes_raw()).digest())
    digest[0] &= 248
    digest[31] = digest[31] & 63 | 64
    return bytes(digest)
