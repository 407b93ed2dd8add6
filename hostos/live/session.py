"""One libtorrent session per process, and the task that hands its alerts to the torrents.

Nothing here contacts anybody but the peers that were named, unless `SwarmSettings` say so: no DHT, no local
discovery; and never port mapping or trackers.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from typing import Any, Protocol, cast

import libtorrent as lt
import trio

from hostos.errors import failure
from hostos.live.interfaces import Interfaces, listen_again
from hostos.live.nodelay import NoDelay
from hostos.live.swarm_settings import PEER_ID, SwarmSettings, limit_everyone

ALERTS = (
    lt.alert.category_t.error_notification
    | lt.alert.category_t.status_notification
    | lt.alert.category_t.storage_notification
    | lt.alert.category_t.piece_progress_notification
    | lt.alert.category_t.block_progress_notification
    | lt.alert.category_t.connect_notification
)

LOOK_EVERY = 1.0
"""Seconds at least between two looks at the network interfaces."""
BUSY_TICK = 0.1
"""Seconds between two looks at the watchdogs while somebody waits for data."""
IDLE_TICK = 5.0


def settings(listen: str, peer_id: str) -> dict[str, Any]:
    """Settings for reading on demand. `listen`: `ADDRESS:PORT`, comma-separated for several; `peer_id`: 20 bytes."""
    return {
        "listen_interfaces": listen,
        "alert_mask": int(ALERTS),
        "alert_queue_size": 50000,
        "user_agent": "hostos",
        "peer_fingerprint": peer_id,
        # Privacy: nobody is told that this machine wants or has something.
        **SwarmSettings().settings(),
        "enable_upnp": False,
        "enable_natpmp": False,
        # TCP only: TCP_NODELAY (hostos.live.nodelay) makes a miss one round trip.
        "enable_outgoing_utp": False,
        "enable_incoming_utp": False,
        # A peer that went away is tried again at once, for ever; all guests behind user-mode
        # networking share one address; a seed and a "finished" downloader stay connected.
        "min_reconnect_time": 1,
        "max_failcount": 1_000_000,
        "connection_speed": 100,
        "torrent_connect_boost": 100,
        "smooth_connects": False,
        "peer_connect_timeout": 5,
        "allow_multiple_connections_per_ip": True,
        "close_redundant_connections": False,
        # What has been fetched is shared without rationing.
        "unchoke_slots_limit": -1,
        # Seconds of a peer's rate that may be asked of it: among several who fetch the same, less waits in its queue.
        "request_queue_time": 1,
        # Small machines: a guest of 192 MB runs this.
        "aio_threads": 2,
        "hashing_threads": 1,
        "file_pool_size": 16,
    }


class Torrent(Protocol):
    """What the session needs of the owner of a torrent."""

    handle: Any
    """Its libtorrent handle; None while it has none."""

    def on_alert(self, alert: Any) -> None: ...

    def tick(self) -> bool:
        """Look after stalled reads; true while somebody waits for data."""
        ...


class Swarm:
    """The session. `run()` must be running for anything to happen."""

    def __init__(self, listen: str) -> None:
        self.listen = listen
        # Drawn anew in each process; as long as a peer ID is, so that libtorrent adds nothing that it does not tell.
        name = PEER_ID + secrets.token_hex(6)
        self.peer_id = name.encode()
        """By which others know us, in all torrents."""
        self.session: Any = lt.session(cast(Any, settings(listen, name)))
        limit_everyone(self.session)
        self.settings = SwarmSettings()
        self.nodelay = NoDelay()
        self._interfaces = Interfaces()
        self._looked = 0.0
        self._listened = False
        self.log: Callable[[str], None] = lambda _message: None
        self._torrents: list[Torrent] = []
        self._alive, self._wake = os.pipe()
        for end in (self._alive, self._wake):
            os.set_blocking(end, False)
        self.session.set_alert_fd(self._wake)

    def apply(self, settings: SwarmSettings) -> None:
        """Deal with others like that from now on; connections that exist stay."""
        if settings != self.settings:
            self.settings = settings
            self.session.apply_settings(settings.settings())

    def join(self, torrent: Torrent) -> None:
        self._torrents.append(torrent)

    def leave(self, torrent: Torrent) -> None:
        if torrent in self._torrents:
            self._torrents.remove(torrent)

    def wake(self) -> None:
        """Make the pump look now, e.g. because a read began to wait."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b"!")

    async def run(self) -> None:
        """Hand out alerts until cancelled. Raises UserError if the listening port is taken."""
        tick = BUSY_TICK
        self.nodelay.scan()
        while True:
            with trio.move_on_after(tick):
                await trio.lowlevel.wait_readable(self._alive)
            with contextlib.suppress(BlockingIOError):
                while os.read(self._alive, 4096):
                    pass
            if time.monotonic() - self._looked > LOOK_EVERY:
                self._looked = time.monotonic()
                if self._interfaces.changed():
                    listen_again(self.session)
            for alert in self.session.pop_alerts():
                self._dispatch(alert)
            # Every owner is asked: one that waits must not keep the others from being looked at.
            waiting = [torrent.tick() for torrent in self._torrents]
            tick = BUSY_TICK if any(waiting) else IDLE_TICK

    def _dispatch(self, alert: Any) -> None:
        if isinstance(alert, lt.listen_failed_alert):
            if not self._listened:
                raise failure(f"cannot listen on {self.listen}: {alert.message()}", "give another port with --listen")
            self.log(f"cannot listen: {alert.message()}")  # on one of several interfaces, or not yet again
        if isinstance(alert, lt.listen_succeeded_alert) and alert.socket_type == lt.socket_type_t.tcp:
            self._listened = True
            self.log(f"listening on port {alert.port}")
        if isinstance(alert, lt.peer_connect_alert | lt.listen_succeeded_alert):
            self.nodelay.scan()
        if isinstance(alert, lt.torrent_alert):
            for torrent in self._torrents:
                if torrent.handle is not None and alert.handle == torrent.handle:
                    torrent.on_alert(alert)
                    return

    def close(self) -> None:
        """End the session; blocks until its threads are gone (they write to our pipe)."""
        self._torrents.clear()
        self._interfaces.close()
        del self.session
        for end in (self._alive, self._wake):
            os.close(end)
