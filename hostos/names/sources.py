"""Where records come from: web servers of their owners (`hostos name serve` is one), and a DHT one chose.

Whatever comes is only a claim; `resolve` proves it.
"""

from __future__ import annotations

import http.client
import time
from collections import deque
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
EMPTY = 2
"""How often a DHT that one has joined may say that it has nothing: a packet may have been lost."""
SETTLE = 2.0
"""Seconds after which a DHT that has said nothing is asked again (its table of nodes may just have been filled), and
that it has for something newer than what it said first. The nodes that are there answer within one second; those that
are gone keep it from saying for ten that this was all."""
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
        self._joined = False
        self._alerts: deque[Any] = deque()
        for node in nodes:
            host, _, port = node.rpartition(":")
            self.session.add_dht_node((host.strip("[]"), int(port)))

    def __enter__(self) -> Dht:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.pause()

    def get(self, key: str, name: str, deadline: float = 2 * DEADLINE) -> bytes | None:
        """The value with the highest number that was found; None if there was none, or none in time."""
        found: tuple[int, bytes] | None = None
        until, empty = time.monotonic() + deadline, 0
        while time.monotonic() < until and empty < EMPTY:
            # Before that, its own table of nodes may be empty.
            joined = self._joined
            self.session.dht_get_mutable_item(bytes.fromhex(key), name.encode())
            wait_until = min(until, time.monotonic() + SETTLE)
            while (alert := self._next(self._lt.dht_mutable_item_alert, wait_until)) is not None:
                item: Any = alert.item
                value = item.get("value") if isinstance(item, dict) else item
                if isinstance(value, bytes) and value and (found is None or alert.seq > found[0]):
                    found = alert.seq, value
                    wait_until = min(until, time.monotonic() + SETTLE)
                # One comes for each better value, and at the end an authoritative one.
                if alert.authoritative:
                    empty += joined
                    break
            if found is not None:
                return found[1]
            time.sleep(0.2)
        return None

    def put(self, key: Ed25519PrivateKey, name: str, data: bytes, deadline: float = PUT_DEADLINE) -> int:
        """Store `data`; on how many nodes. Raises a failure if no node took it."""
        public = key.public_key().public_bytes_raw()
        until = time.monotonic() + deadline
        while time.monotonic() < until:
            self.session.dht_put_mutable_item(expanded(key), public, data, name.encode())
            alert = self._next(self._lt.dht_put_alert, min(until, time.monotonic() + PUT_DEADLINE / 2))
            if alert is not None and alert.num_success:
                return int(alert.num_success)
            time.sleep(0.2)
        raise failure("no node of the DHT took the record", "are its nodes reachable? hostos name dht HOST:PORT…")

    def _next(self, kind: type, until: float) -> Any:
        """The next alert of that kind; None if there is none until then."""
        while (left := until - time.monotonic()) > 0:
            while self._alerts:
                alert = self._alerts.popleft()
                self._joined |= isinstance(alert, self._lt.dht_bootstrap_alert)
                if isinstance(alert, kind):
                    return alert
            self.session.wait_for_alert(int(left * 1000) + 1)
            self._alerts.extend(self.session.pop_alerts())
        return None


def expanded(key: Ed25519PrivateKey) -> bytes:
    """The form libtorrent signs with: SHA-512 of the seed, clamped (RFC 8032 §5.1.5)."""
    digest = bytearray(sha512(key.private_bytes_raw()).digest())
    digest[0] &= 248
    digest[31] = digest[31] & 63 | 64
    return bytes(digest)
