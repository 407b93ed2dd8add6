"""Verified ranges of a BitTorrent v2 torrent, fetched when they are read.

A read waits for its pieces. `pieces` knows which of them are on this machine and has their bytes,
`membership` asks the swarm for the others, `schedule` says what to fetch although nobody waits for it.
This module joins them, and the swarm anew when something is wrong: not before pieces are confirmed to
be on disk, as libtorrent then forgets the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import libtorrent as lt
import trio

from hostos.live.journal import Journal
from hostos.live.ledger import Endpoint, Ledger
from hostos.live.membership import Membership, Parameters
from hostos.live.pieces import PieceHashes, PieceStore
from hostos.live.readers import Readers, Wait
from hostos.live.schedule import PATIENCE, PRIORITIES, Schedule
from hostos.live.session import Swarm
from hostos.live.source import ReadAhead, SourceError, SourceStats, Waits
from hostos.live.url import Url
from hostos.live.web_seeds import WebPieces, WebSeeds

FLUSH_EVERY = 0.5
"""Seconds between two confirmations that pieces are in the file (until then they cost memory)."""
FLUSH_LIMIT = 0.5
"""Seconds to wait for such a confirmation before the torrent is added anew anyway."""
OFFER_SLICE, OFFER_EVERY = 0.05, 10.0
"""Seconds at a time in which what an earlier run left is proved for others, while nobody here waits; and between two
times that they are told."""
LOST_PAUSE = 0.5
"""Seconds before a piece that could not be written is tried again: the disk is likely full."""
DEMAND = PRIORITIES["demand"]
HEDGE = 1.0
"""Seconds that connected peers have for a piece somebody waits for before web seeds are asked, too. Halved
each time those were faster, doubled each time they were not."""
HURRY = 2.0
"""Seconds after which libtorrent is given a deadline for a piece that somebody waits for: it then asks other peers for
it, too."""
GIVE_AGAIN = 1.0
"""Seconds after which libtorrent is handed a piece again that it has not confirmed."""


def from_torrent(data: bytes) -> Parameters:
    """Parameters from the bytes of a .torrent file, piece hashes included."""
    return lambda: lt.load_torrent_buffer(data)


def from_metadata(info: Any) -> Parameters:
    """Parameters from a `torrent_info` that came from peers."""

    def make() -> Any:
        parameters = lt.add_torrent_params()
        parameters.ti = info
        return parameters

    return make


class TorrentSource:
    """A `BlockSource` over the content of one torrent, as one range of bytes.

    `directory`: where libtorrent keeps the content. `deadline`: seconds after which a read fails.
    `keep`: pieces stay in memory and the directory is never read (small torrents). `hashes`: lets what
    an earlier run left be used; without them it is fetched again. `schedule.rest`: whether the rest
    is fetched, too, while nobody waits. `web`: servers that have the file below `web_path`, asked while
    no peer is connected, or when peers take too long; needs `hashes`.
    """

    def __init__(
        self,
        swarm: Swarm,
        parameters: Parameters,
        directory: Path,
        peers: Iterable[Endpoint] = (),
        *,
        deadline: float = 120.0,
        keep: bool = False,
        hashes: PieceHashes | None = None,
        web: WebSeeds | None = None,
        web_path: str = "",
    ) -> None:
        self._swarm, self._directory = swarm, directory
        self.deadline, self.keep = deadline, keep
        self.ledger = Ledger(peers)
        info = parameters().ti
        self.info = info
        # libtorrent 2.0 counts the padding after the last file, 2.1 doesn't.
        files = info.files()
        self._size: int = max(
            files.file_offset(index) + files.file_size(index)
            for index in range(files.num_files())
            if not files.file_flags(index) & lt.file_storage.flag_pad_file
        )
        self.piece_size: int = info.piece_length()
        self.pieces: int = info.num_pieces()
        self._store = PieceStore(
            directory / files.file_path(0),
            self._size,
            self.piece_size,
            self.pieces,
            keep=keep,
            hashes=hashes,
            lost=self._lost,
        )
        self._membership = Membership(swarm, parameters, directory, self.ledger, self)
        self._waiting = Readers()
        self._given: dict[int, float] = {}
        """Pieces from web seeds that libtorrent has not confirmed yet, and when it was handed them."""
        self._hedge = HEDGE
        self.web: WebPieces | None = None
        if hashes is not None:
            self.web = WebPieces(
                web or WebSeeds(()), web_path, self._size, hashes, self._from_web, self._not_on_the_web
            )
        self.schedule = Schedule(self.pieces, self.piece_size, self._expected, self._ask)
        self.journal = Journal(self.pieces)
        self._read_ahead = ReadAhead()
        self._flushed: trio.Event | None = None
        self._trouble: str = ""
        self._rebuilding = False
        self._proved = 0
        """Pieces from an earlier run that are right, and that libtorrent does not know to be here."""
        self._offered = 0.0
        self._waits = Waits()
        self._stats = SourceStats(size=self._size)
        self._hash_failures = 0
        self._nursery: trio.Nursery | None = None

    @property
    def size(self) -> int:
        return self._size

    # --- life -------------------------------------------------------------------------------------

    def start(self, nursery: trio.Nursery, handle: Any = None) -> None:
        """Join the swarm. What an earlier run left in the directory is used once it is proved.

        `handle`: of this torrent in this session, with nothing fetched yet and the same directory: it is taken over,
        and all pieces are asked for at once.
        """
        self._nursery = nursery
        self._directory.mkdir(parents=True, exist_ok=True)
        self._store.open()
        if self.web:
            self.web.start(nursery)
        self._membership.patient = self._webbed
        if handle is not None:
            self._membership.adopt(handle, dict.fromkeys(range(self.pieces), DEMAND))
        else:
            self._membership.join(self._store.on_disk(), self._wanted())

    async def close(self) -> None:
        """Leave the swarm; reads that wait fail."""
        if self.web:
            await self.web.close()
        if self._membership.handle is not None:
            await self._flush()
        self._membership.leave()
        self._store.forget_unwritten()
        self._waiting.wake_all()
        self._store.close()
        self._nursery = None

    def _wanted(self) -> dict[int, int]:
        """What the swarm is asked for: pieces and their priorities."""
        asked = {piece: asked.priority for piece, asked in self.schedule.asked.items()}
        return {**asked, **{wait.piece: DEMAND for wait in self._waiting}}

    def _expected(self, piece: int) -> bool:
        """Nobody needs to ask for it (any more)."""
        return self._store.expected(piece) or piece in self._waiting

    @property
    def _webbed(self) -> bool:
        """Whether there are web seeds."""
        return self.web is not None and bool(self.web.servers.all())

    def add_web_seed(self, url: Url) -> None:
        """One more server that has the file."""
        if self.web:
            self.web.servers.add(url)
            self._membership.patient = True

    def replay(self, pieces: Iterable[int]) -> deque[int]:
        """Fetch these pieces ahead, in this order; `schedule.drop` leaves off."""
        plan = self.schedule.replay(pieces)
        self.schedule.pump(waiting=bool(self._waiting))
        self._swarm.wake()
        return plan

    # --- reading ----------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytes:
        """Verified bytes; waits for them. Raises `SourceError` at the deadline."""
        end = min(offset + length, self._size)
        if offset < 0 or end <= offset:
            return b""
        first, last = offset // self.piece_size, (end - 1) // self.piece_size
        self._stats.reads += 1
        self._stats.read_bytes += end - offset
        self.journal.reading(offset, end - offset, first, last)
        for piece in range(first, last + 1):
            self._proved += self._store.prove(piece)
        missing = [piece for piece in range(first, last + 1) if not self._store.ready(piece)]
        began = time.monotonic()
        absent = any(not self._store.verified(piece) for piece in missing)
        # Then the wait tells how long a piece takes that nobody had asked for.
        fresh = all(not (self._expected(piece) or piece in self.schedule.asked) for piece in missing)
        wanted = [self._want(piece) for piece in missing]
        if ahead := self._read_ahead.pieces(first, last):
            self.schedule.ahead(range(last + 1, min(last + 1 + ahead, self.pieces)))
        self.schedule.pump(waiting=bool(self._waiting))
        if wanted:
            self._stats.misses += absent
            await self._waiting.wait(wanted, self.deadline)
            if absent:
                self._waits.add(time.monotonic() - began)
                if fresh:
                    self._read_ahead.adapt(time.monotonic() - began)
        parts = []
        for piece in range(first, last + 1):
            start = piece * self.piece_size
            low, high = max(offset, start), min(end, start + self.piece_size)
            parts.append(self._take(piece, low, high))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _take(self, piece: int, low: int, high: int) -> bytes:
        data = self._store.get(piece, low, high)
        if data is not None:
            return data
        if self._nursery is None:
            raise SourceError("the image was unmounted")
        why = f"no data within {self.deadline:g} s; {self._membership.why_late()}"
        if self.web and self._webbed:
            why += f"; {self.web.servers.why_late()}"
        self._stats.errors += 1
        self._stats.last_error = why + (f"; {self._trouble}" if self._trouble else "")
        raise SourceError(self._stats.last_error)

    def _want(self, piece: int) -> Wait:
        """Ask for a piece on behalf of one more reader."""
        if (wait := self._waiting.find(piece)) is not None:
            return wait
        if not self._waiting:
            self._membership.expect()
        wait = self._waiting.begin(piece)
        late = self.schedule.demanded(piece)
        if late:
            self._stats.late += 1
        if self._store.verified(piece):
            self._membership.read_back(piece)
        elif not late and self.schedule.left_to_others(piece):
            wait.left = True
        else:
            self._ask(piece, DEMAND)
            self._rebuild_if(self._membership.lonely())
        return wait

    def _ask(self, piece: int, priority: int) -> None:
        """Have a piece fetched: from peers, and from web seeds if there is nobody else."""
        if self.web and self._webbed and not self._membership.connected:
            self.web.fetch(piece, ahead=priority < DEMAND)
            if priority < DEMAND:
                return
        elif self.web and self._webbed and priority == DEMAND and not self._hedge:
            self.web.fetch(piece, ahead=False)
        self._membership.ask(piece, priority)

    def _look_after_what_was_left(self) -> None:
        """Ask for it here once another machine has it to give, or is late with it."""
        for wait in (each for each in self._waiting if each.left):
            late = time.monotonic() - wait.began > PATIENCE
            if self.schedule.left_to_others(wait.piece) and not late:
                continue
            if late:
                self.schedule.let_down(wait.piece)
            wait.left, wait.asked = False, time.monotonic()
            # Nobody was asked until now, so nobody has failed to answer.
            self._membership.expect()
            self._ask(wait.piece, DEMAND)

    # --- alerts -----------------------------------------------------------------------------------

    def on_alert(self, alert: Any) -> None:
        if isinstance(alert, lt.piece_finished_alert):
            self._finished(alert.piece_index)
        elif isinstance(alert, lt.read_piece_alert):
            self._delivered(alert)
        elif isinstance(alert, lt.cache_flushed_alert):
            for piece in self._store.confirm_flush():
                self._waiting.wake(piece)
            if self._flushed is not None:
                self._flushed.set()
        elif isinstance(alert, lt.hash_failed_alert):
            self._hash_failures += 1
            self._rebuild_if("a piece had the wrong hash")
        elif isinstance(alert, lt.file_error_alert):
            trouble = f"the cache cannot be written: {alert.error.message()}"
            if trouble != self._trouble:
                self.log(trouble)
            self._trouble = trouble

    def _finished(self, piece: int) -> None:
        self._store.finished(piece)
        if self._given.pop(piece, None) is not None:
            return
        if self.web:
            self.web.forget(piece)
            if self._webbed and piece in self._waiting:
                self._hedge = min(2 * max(self._hedge, HEDGE / 8), HEDGE)
        self.journal.arrived(piece, self.schedule.arrived(piece))
        self.schedule.pump(waiting=bool(self._waiting))
        if piece in self._waiting or self.keep:
            self._membership.read_back(piece)

    def _delivered(self, alert: Any) -> None:
        piece = alert.piece
        if alert.error.value():
            self._store.unreadable(piece)
            if piece in self._waiting:
                self._ask(piece, DEMAND)
        elif self._store.delivered(piece, alert.buffer):
            self._waiting.wake(piece)

    # --- from web seeds ---------------------------------------------------------------------------

    def _from_web(self, piece: int, data: bytes) -> None:
        """A proved piece came."""
        if self._store.ready(piece) or self._nursery is None:
            self.schedule.asked.pop(piece, None)
            return
        if piece in self._waiting and self._membership.connected:
            self._hedge = self._hedge / 2 if self._hedge > HEDGE / 8 else 0.0
        self._store.take(piece, data)
        self._give(piece, data)
        self._membership.came()
        self.journal.arrived(piece, self.schedule.arrived(piece))
        self._waiting.wake(piece)
        self.schedule.pump(waiting=bool(self._waiting))

    def _give(self, piece: int, data: bytes) -> None:
        self._given[piece] = time.monotonic()
        self._membership.give(piece, data)

    def _not_on_the_web(self, piece: int) -> None:
        self.schedule.asked.pop(piece, None)

    def _look_after_web(self) -> None:
        now = time.monotonic()
        for piece, when in list(self._given.items()):
            if now - when > GIVE_AGAIN and not self._rebuilding:
                if (data := self._store.held(piece)) is not None:
                    self._give(piece, data)
                else:
                    del self._given[piece]
        if not self.web or not self._webbed:
            return
        if not self._membership.connected:
            for piece in self.schedule.asked:
                self.web.fetch(piece, ahead=True)
        for wait in self._waiting:
            if not self._membership.connected or now - wait.began > self._hedge:
                self.web.fetch(wait.piece, ahead=False)

    # --- for others -------------------------------------------------------------------------------

    def _offer(self) -> bool:
        """While peers are there that lack something: prove what an earlier run left, and let them have it, for which
        the swarm is joined anew. Whether there is more to do."""
        if not self._membership.connected or (self._store.next_claim() is None and not self._proved):
            return False
        if self._membership.neighbours().others:
            began = time.monotonic()
            while (piece := self._store.next_claim()) is not None and time.monotonic() - began < OFFER_SLICE:
                self._proved += self._store.prove(piece)
            if self._proved and (piece is None or began - self._offered > OFFER_EVERY):
                self._offered = began
                self._rebuild_if("others may have what an earlier run left")
        return True

    # --- getting it onto the disk -----------------------------------------------------------------

    def _begin_flush(self) -> None:
        self._store.begin_flush()
        self._membership.flush()

    async def _flush(self) -> None:
        """Have everything that is verified confirmed on disk, within `FLUSH_LIMIT`."""
        for _ in range(2):  # one may be under way that does not cover the newest pieces
            if not self._store.flushing and not self._store.unflushed:
                return
            if not self._store.flushing:
                self._begin_flush()
            self._flushed = trio.Event()
            with trio.move_on_after(FLUSH_LIMIT):
                await self._flushed.wait()
            self._flushed = None

    def _lost(self) -> None:
        """What libtorrent believes to have is not there: make it fetch the piece again when asked."""
        self._trouble = self._trouble or "the cache loses what is written to it"
        self._rebuild_if("a piece was lost on its way to the cache", pause=LOST_PAUSE)

    # --- when things go wrong ---------------------------------------------------------------------

    def tick(self) -> bool:
        if self._membership.handle is None:
            return bool(self._waiting)
        self._look_after_web()
        if not self._store.flushing and self._store.unflushed and self._store.since_flush() > FLUSH_EVERY:
            self._begin_flush()
        if self.schedule.active or self._waiting:
            self.schedule.neighbours = self._membership.neighbours()
        self._look_after_what_was_left()
        if not self._waiting:
            # Back to several sources only while nobody waits.
            self._rebuild_if(self._membership.cleared())
            if self.schedule.active:
                self.schedule.pump(waiting=False)
            busy = self.schedule.active or self._store.unflushed or self._store.flushing or bool(self._given)
            return self._offer() or busy
        if not self._membership.connected:
            self._rebuild_if(self._membership.lonely())
        else:
            self._rebuild_if(self._membership.stalled())
            self._hurry()
        return True

    def _hurry(self) -> None:
        """Have others asked as well for what has been waited for too long."""
        now = time.monotonic()
        for wait in self._waiting:
            if now - wait.asked > HURRY and not self._store.verified(wait.piece):
                wait.asked = now
                self._membership.hurry(wait.piece)

    def _rebuild_if(self, why: str, pause: float = 0.0) -> None:
        """Join the swarm anew in `pause` seconds, if there is a reason."""
        if why and not self._rebuilding and self._nursery is not None:
            self._rebuilding = True
            self._nursery.start_soon(self._rebuild, why, pause)

    async def _rebuild(self, why: str, pause: float) -> None:
        try:
            await trio.sleep(pause)
            await self._flush()
            if self._membership.handle is None or self._nursery is None:
                return
            self.log(f"joining anew: {why}")
            self._stats.rebuilds += 1
            self._store.forget_unwritten()
            self._proved = 0
            self._membership.join_anew(self._store.on_disk(), self._wanted())
        finally:
            self._rebuilding = False

    def log(self, message: str) -> None:
        self._swarm.log(f"{self.info.name()[:64]}: {message}")

    # --- telling ----------------------------------------------------------------------------------

    def stats(self) -> SourceStats:
        stats = self._stats
        stats.downloaded, stats.uploaded, stats.wasted = self._membership.totals()
        stats.verified = self._store.verified_bytes()
        stats.stalls, stats.hash_failures = self._membership.stalls, self._hash_failures
        came = self.journal.counts()
        stats.prefetched, stats.prefetch_used = came["trace"] + came["ahead"], self.journal.used
        stats.peers, stats.banned = len(self._membership.connected), len(self.ledger.bans)
        if self.web:
            servers = self.web.servers
            stats.downloaded += servers.downloaded
            stats.wasted += servers.wasted
            stats.hash_failures = self._hash_failures + servers.wrong
            stats.peers += len(servers.all())
            stats.banned += servers.banned
        self._waits.into(stats)
        return stats

    def peers(self) -> list[dict[str, Any]]:
        """The connected peers: address, bytes received from each, and what is held against it."""
        return self._membership.peers() + (self.web.servers.describe() if self.web else [])
