"""A torrent's part in the swarm: libtorrent's handle for it, its peers, and the patience with them.

libtorrent's own handling of a peer that lies or says nothing can stall for ever, and a torrent
nobody reads from never reconnects (docs/live-boot.md). So the torrent leaves and joins anew, which
connects within milliseconds, with the sources that `Ledger` still trusts. This module knows when
that is due and how it is done; `torrent_source` does it, as pieces must be safe first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import libtorrent as lt

from hostos.live.ledger import Endpoint, Ledger
from hostos.live.neighbours import NOBODY, Neighbours, Watch
from hostos.live.session import Swarm

STALL_FIRST, STALL_MOST = 1.0, 8.0
"""Seconds without a byte after which other sources are tried; doubled each time up to the most."""
OFFLINE_FIRST, OFFLINE_MOST = 0.25, 2.0
"""Seconds between two attempts to reach anybody at all; doubled each time up to the most."""
OFFLINE_PATIENT = 10.0
"""The least of them while the same can be had elsewhere: what came meanwhile is handed over again each time."""

LOOK_EVERY = 0.05
"""Seconds at least between two looks at what peers have."""

Parameters = Callable[[], Any]
"""Makes fresh `add_torrent_params` with the torrent's metadata, nothing else set."""


class Owner(Protocol):
    """Whose torrent it is."""

    def on_alert(self, alert: Any) -> None:
        """Called with each alert, after what it says of peers was noted."""
        ...

    def tick(self) -> bool: ...

    def log(self, message: str) -> None: ...


class Membership:
    """Not joined at first: `handle` is None then. `directory`: where libtorrent keeps the content."""

    def __init__(self, swarm: Swarm, parameters: Parameters, directory: Path, ledger: Ledger, owner: Owner) -> None:
        self._swarm, self._parameters, self._directory = swarm, parameters, directory
        self._ledger, self._owner = ledger, owner
        self.handle: Any = None
        self.connected: set[Endpoint] = set()
        self.stalls = 0
        self._alone: Endpoint | None = None
        self._authors: dict[int, set[Endpoint]] = {}
        self._joined = 0.0
        self._progress = time.monotonic()
        self._received = 0
        self._stall_after = STALL_FIRST
        self.patient = False
        """Nobody connected is no reason to hurry: there are other ways to get what is wanted."""
        self._offline_pause = OFFLINE_FIRST
        self._neighbours, self._looked, self._look_every = NOBODY, 0.0, LOOK_EVERY
        self._watch = Watch(swarm.peer_id)
        self._past = (0, 0, 0)  # downloaded, uploaded, wasted by earlier handles

    # --- in and out -------------------------------------------------------------------------------

    def join(self, have: Sequence[bool], wanted: Mapping[int, int]) -> None:
        """`have`: for each piece, whether it is on disk; `wanted`: pieces and their priorities."""
        parameters = self._parameters()
        parameters.save_path = str(self._directory)
        parameters.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
        parameters.piece_priorities = [0] * len(have)
        # Peers given here, with nothing to check, are connected at once. Every other way of naming
        # them waits for the session's next tick, up to a second.
        parameters.flags |= lt.torrent_flags.no_verify_files
        parameters.have_pieces = list(have)
        sources = self._ledger.sources()
        self._alone = sources[0] if self._ledger.careful and len(sources) == 1 else None
        if self._alone:
            parameters.flags |= (
                lt.torrent_flags.disable_pex | lt.torrent_flags.disable_dht | lt.torrent_flags.disable_lsd
            )
        parameters.peers = list(sources)
        self._swarm.join(self)
        self.handle = self._swarm.session.add_torrent(parameters)
        self._joined = self._progress = time.monotonic()
        self._received = 0
        for piece, priority in wanted.items():
            self.ask(piece, priority)

    def adopt(self, handle: Any, wanted: Mapping[int, int]) -> None:
        """Be in the swarm by a handle that exists, of which nothing is wanted yet; `wanted` as in `join`."""
        self._swarm.join(self)
        handle.prioritize_pieces(list(wanted.items()))
        self.handle = handle
        self._joined = self._progress = time.monotonic()
        for peer in handle.get_peer_info():
            if not peer.flags & (lt.peer_info.connecting | lt.peer_info.handshake):
                self.connected.add((peer.ip[0], peer.ip[1]))

    def leave(self) -> None:
        """Nothing happens if it is not joined."""
        self._swarm.leave(self)
        if self.handle is None:
            return
        self._past = self.totals()
        handle, self.handle = self.handle, None
        self._swarm.session.remove_torrent(handle)
        self.connected.clear()
        self._authors.clear()

    def join_anew(self, have: Sequence[bool], wanted: Mapping[int, int]) -> None:
        """Leave, and join with the sources that are trusted now."""
        for peer in self.handle.get_peer_info():
            # Found by peer exchange. One that connected to us has a port nobody listens on.
            if peer.flags & lt.peer_info.outgoing_connection:
                self._ledger.add((peer.ip[0], peer.ip[1]))
        self.leave()
        self.join(have, wanted)

    # --- asking (nothing happens while it is not joined) ------------------------------------------

    def ask(self, piece: int, priority: int) -> None:
        """Have a piece fetched; `priority`: 1 to 7, the highest first."""
        if self.handle is not None:
            self.handle.piece_priority(piece, priority)

    def hurry(self, piece: int) -> None:
        """Have a piece fetched from whoever has it."""
        if self.handle is not None:
            self.handle.set_piece_deadline(piece, 0)

    def read_back(self, piece: int) -> None:
        """Have libtorrent hand over a piece that it has, in a `read_piece_alert`."""
        if self.handle is not None:
            self.handle.read_piece(piece)

    def flush(self) -> None:
        """Have libtorrent write what it has, and say so in a `cache_flushed_alert`."""
        if self.handle is not None:
            self.handle.flush_cache()

    def give(self, piece: int, data: bytes) -> None:
        """Hand libtorrent a piece that came another way: it keeps it, and serves it to others."""
        if self.handle is not None:
            self.handle.add_piece(piece, data, 0)

    # --- who sends what ---------------------------------------------------------------------------

    def on_alert(self, alert: Any) -> None:
        if isinstance(alert, lt.block_finished_alert):
            self._authors.setdefault(alert.piece_index, set()).add(_endpoint(alert))
            self._progress = time.monotonic()
        elif isinstance(alert, lt.piece_finished_alert):
            self._progress = time.monotonic()
            self._stall_after, self._offline_pause = STALL_FIRST, OFFLINE_FIRST
            self._ledger.good(self._authors.pop(alert.piece_index, ()))
        elif isinstance(alert, lt.hash_failed_alert):
            authors = self._authors.pop(alert.piece_index, set())
            self._ledger.failed(authors)
            verb = "banned" if len(authors) == 1 else "suspected"
            names = ", ".join(f"{host}:{port}" for host, port in sorted(authors))
            self._owner.log(f"piece {alert.piece_index} had the wrong hash; {verb}: {names or 'nobody'}")
        elif isinstance(alert, lt.peer_connect_alert):
            self.connected.add(_endpoint(alert))
        elif isinstance(alert, lt.peer_disconnected_alert):
            self.connected.discard(_endpoint(alert))
        self._owner.on_alert(alert)

    def tick(self) -> bool:
        return self._owner.tick()

    def neighbours(self) -> Neighbours:
        """The peers that are fetching, too, and what they have."""
        now = time.monotonic()
        if not self.connected or self.handle is None:
            self._neighbours = NOBODY
        elif now - self._looked > self._look_every:
            self._neighbours = self._watch.look(
                (peer.pid.to_bytes(), peer.pieces)
                for peer in self.handle.get_peer_info()
                if not peer.flags & (lt.peer_info.seed | lt.peer_info.connecting | lt.peer_info.handshake)
            )
            self._looked = time.monotonic()
            # It takes longer the larger the image is.
            self._look_every = max(LOOK_EVERY, 20 * (self._looked - now))
        return self._neighbours

    # --- patience ---------------------------------------------------------------------------------

    def expect(self) -> None:
        """Somebody begins to wait for a piece."""
        self._progress = time.monotonic()
        self._stall_after = STALL_FIRST
        self._swarm.wake()

    def came(self) -> None:
        """Something arrived another way."""
        self._progress = time.monotonic()

    def lonely(self) -> str:
        """Why to join anew, if nobody is connected; else nothing."""
        now = time.monotonic()
        if self.handle is None or self.connected or now - self._joined <= self._offline_pause:
            return ""
        patient = self.patient or self._swarm.settings.discovers
        if patient and (not self._ledger.sources() or now - self._joined <= OFFLINE_PATIENT):
            return ""
        self._offline_pause = min(2 * self._offline_pause, OFFLINE_MOST)
        return "nobody connected"

    def stalled(self) -> str:
        """Why to join anew, if nothing has come for too long; else nothing."""
        now = time.monotonic()
        if now - self._progress <= self._stall_after:
            return ""
        # A slow link is not a dead one: any byte counts.
        received = self.handle.status().total_download
        if received > self._received:
            self._received, self._progress = received, now
            return ""
        self.stalls += 1
        self._stall_after = min(2 * self._stall_after, STALL_MOST)
        if self._alone:
            self._ledger.stalled(self._alone)
        elif len(self.connected) > 1:
            self._ledger.careful = True
        return "nothing came"

    def cleared(self) -> str:
        """Why to join anew, if the only source in use has proved itself; else nothing."""
        if self._alone and not self._ledger.careful and time.monotonic() - self._joined > STALL_FIRST:
            return "back to all sources"
        return ""

    # --- telling ----------------------------------------------------------------------------------

    def totals(self) -> tuple[int, int, int]:
        """Bytes downloaded, uploaded, and wasted, since the beginning."""
        downloaded, uploaded, wasted = self._past
        if self.handle is not None:
            status = self.handle.status()
            downloaded += status.total_payload_download
            uploaded += status.total_payload_upload
            wasted += status.total_failed_bytes + status.total_redundant_bytes
        return downloaded, uploaded, wasted

    def peers(self) -> list[dict[str, Any]]:
        """The connected peers: address, bytes received from each, and what is held against it."""
        found = []
        with suppress(RuntimeError):  # the torrent may just be being added anew
            for peer in self.handle.get_peer_info() if self.handle is not None else ():
                endpoint: Endpoint = (peer.ip[0], peer.ip[1])
                found.append(
                    {
                        "peer": f"{endpoint[0]}:{endpoint[1]}",
                        "downloaded": peer.total_download,
                        "rate": peer.payload_down_speed,
                        "uploaded": peer.total_upload,
                        "suspicion": self._ledger.suspicion(endpoint),
                    }
                )
        return found

    def why_late(self) -> str:
        """Whom a read waited for in vain."""
        names = ", ".join(f"{host}:{port}" for host, port in self._ledger.peers) or "none known"
        why = f"connected to {len(self.connected)} of the peers: {names}"
        if bans := self._ledger.bans:
            why += f"; {len(bans)} banned for sending wrong data"
        return why


def _endpoint(alert: Any) -> Endpoint:
    host, port = alert.ip
    return str(host), int(port)
