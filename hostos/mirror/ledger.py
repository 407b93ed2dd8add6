"""What the cache holds and what passed through it: for eviction and for the statistics. SQLite.

Only the proxy writes it, each figure at most once a second. That a file is in the store is told by the
file itself; a row without one, or a file without one, is mended when the proxy starts.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ("requests", "hits", "misses", "refused", "served", "from_mirror", "from_peers")
"""Of an archive: how many requests, of which answered from the store, fetched, and refused; and bytes
sent to clients, received from its mirrors, received from peers."""
LIAR_S = 7 * 86400.0
"""How long a peer that sent wrong bytes is not asked again."""

_TABLES = """
CREATE TABLE IF NOT EXISTS content (
  sha256 TEXT PRIMARY KEY, size INTEGER, location TEXT, added REAL, used REAL, hits INTEGER, asked INTEGER);
CREATE TABLE IF NOT EXISTS traffic (archive TEXT PRIMARY KEY, requests INTEGER DEFAULT 0, hits INTEGER DEFAULT 0,
  misses INTEGER DEFAULT 0, refused INTEGER DEFAULT 0, served INTEGER DEFAULT 0, from_mirror INTEGER DEFAULT 0,
  from_peers INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS peer (address TEXT PRIMARY KEY, received INTEGER DEFAULT 0, sent INTEGER DEFAULT 0,
  lied REAL DEFAULT 0);
"""


@dataclass(frozen=True)
class Content:
    """A file of the store. `asked`: somebody here wanted it (not: it was contributed)."""

    sha256: str
    size: int
    location: str
    added: float
    used: float
    hits: int
    asked: int


class Ledger:
    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("PRAGMA cache_size=-1024")
        self._db.executescript(_TABLES)
        self._pending: dict[str, Counter[str]] = {}
        self._used: Counter[str] = Counter()
        self._peers: dict[str, Counter[str]] = {}

    def close(self) -> None:
        self.flush()
        self._db.close()

    # --- figures ---

    def count(self, archive: str, **figures: int) -> None:
        self._pending.setdefault(archive, Counter()).update(figures)

    def count_peer(self, address: str, *, received: int = 0, sent: int = 0) -> None:
        self._peers.setdefault(address, Counter()).update(received=received, sent=sent)

    def use(self, sha256: str) -> None:
        self._used[sha256] += 1

    def flush(self) -> None:
        """Write what has been counted."""
        if not (self._pending or self._used or self._peers):
            return
        now = time.time()
        self._db.execute("BEGIN")
        for archive, figures in self._pending.items():
            self._db.execute("INSERT OR IGNORE INTO traffic (archive) VALUES (?)", (archive,))
            changes = ", ".join(f"{field} = {field} + ?" for field in FIELDS)
            values = [figures[field] for field in FIELDS]
            self._db.execute(f"UPDATE traffic SET {changes} WHERE archive = ?", (*values, archive))
        for address, counted in self._peers.items():
            self._db.execute("INSERT OR IGNORE INTO peer (address) VALUES (?)", (address,))
            self._db.execute(
                "UPDATE peer SET received = received + ?, sent = sent + ? WHERE address = ?",
                (counted["received"], counted["sent"], address),
            )
        self._db.executemany(
            "UPDATE content SET used = ?, hits = hits + ?, asked = 1 WHERE sha256 = ?",
            [(now, count, sha256) for sha256, count in self._used.items()],
        )
        self._db.execute("COMMIT")
        self._pending.clear()
        self._used.clear()
        self._peers.clear()

    def traffic(self) -> dict[str, dict[str, int]]:
        self.flush()
        rows = self._db.execute(f"SELECT archive, {', '.join(FIELDS)} FROM traffic ORDER BY archive").fetchall()
        return {archive: dict(zip(FIELDS, figures, strict=True)) for archive, *figures in rows}

    def peers(self) -> list[dict[str, Any]]:
        self.flush()
        rows = self._db.execute("SELECT address, received, sent, lied FROM peer ORDER BY received DESC LIMIT 100")
        return [dict(zip(("address", "received", "sent", "lied"), row, strict=True)) for row in rows]

    # --- peers that lied ---

    def lied(self, address: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO peer (address) VALUES (?)", (address,))
        self._db.execute("UPDATE peer SET lied = ? WHERE address = ?", (time.time(), address))

    def is_liar(self, address: str) -> bool:
        row = self._db.execute("SELECT lied FROM peer WHERE address = ?", (address,)).fetchone()
        return bool(row) and time.time() - float(row[0]) < LIAR_S

    # --- contents ---

    def add(self, sha256: str, size: int, location: str, *, asked: bool) -> None:
        now = time.time()
        self._db.execute(
            "INSERT OR IGNORE INTO content VALUES (?, ?, ?, ?, ?, 0, ?)",
            (sha256, size, location, now, now, int(asked)),
        )

    def remove(self, sha256: str) -> None:
        self._db.execute("DELETE FROM content WHERE sha256 = ?", (sha256,))

    def contents(self) -> list[Content]:
        """Everything, in the order in which it may go: contributed first, then what was used longest ago."""
        self.flush()
        rows = self._db.execute(
            "SELECT sha256, size, location, added, used, hits, asked FROM content ORDER BY asked, used"
        )
        return [Content(*row) for row in rows]

    def total(self) -> tuple[int, int]:
        """(files, bytes) of the store."""
        count, size = self._db.execute("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM content").fetchone()
        return int(count), int(size)

    def wanted_since(self, when: float) -> list[str]:
        """Contents that somebody here asked for since `when` (Unix time)."""
        self.flush()
        rows = self._db.execute("SELECT sha256 FROM content WHERE asked = 1 AND used >= ?", (when,))
        return [sha256 for (sha256,) in rows]
