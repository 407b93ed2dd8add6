"""What is signed: every file that a verified Release or index names, with its size and SHA-256.

An SQLite database, because a Debian suite alone names more than 60 000 files and the proxy is to stay
small. Written by the proxy (releases) and by the index reader (`indexes`), which is a process of its
own; both only add what a signature covers.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hostos.mirror.release import Release

GENERATIONS = 3
"""Releases of a suite whose files stay known: clients may be a little behind."""
BUSY_S = 30.0

_TABLES = """
CREATE TABLE IF NOT EXISTS release (
  root TEXT PRIMARY KEY, date REAL, valid_until REAL, fetched REAL, modified TEXT,
  inline BLOB, text BLOB, signature BLOB);
CREATE TABLE IF NOT EXISTS listed (
  root TEXT, path TEXT, size INTEGER, sha256 TEXT, sha512 TEXT, date REAL,
  PRIMARY KEY (root, path, sha256)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS listed_sha256 ON listed (sha256);
CREATE INDEX IF NOT EXISTS listed_sha512 ON listed (sha512);
CREATE TABLE IF NOT EXISTS parsed (location TEXT PRIMARY KEY, sha256 TEXT, at REAL);
CREATE TABLE IF NOT EXISTS file (
  location TEXT PRIMARY KEY, size INTEGER, sha256 TEXT, name TEXT, origin TEXT, seen REAL);
CREATE INDEX IF NOT EXISTS file_name ON file (name);
CREATE INDEX IF NOT EXISTS file_sha256 ON file (sha256);
"""


@dataclass(frozen=True)
class Known:
    """A file as signed. `location`: `host/path`; `size` in bytes; `modified`: HTTP date or empty."""

    location: str
    size: int
    sha256: str


@dataclass(frozen=True)
class StoredRelease:
    """A verified Release: clear-signed (`inline`), or `text` with its `signature`."""

    root: str
    date: float
    valid_until: float | None
    fetched: float
    modified: str
    inline: bytes
    text: bytes
    signature: bytes


@dataclass(frozen=True)
class FileRow:
    """What an index says of a file. `name`: what stays the same between versions."""

    location: str
    size: int
    sha256: str
    name: str


class Catalogue:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        # WAL: the proxy reads while the index reader writes. A power cut may take the last
        # transactions, which are fetched again.
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("PRAGMA cache_size=-4096")
        self._db.executescript(_TABLES)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # --- releases ---

    def release(self, root: str) -> StoredRelease | None:
        row = self._db.execute(
            "SELECT root, date, valid_until, fetched, modified, inline, text, signature FROM release WHERE root = ?",
            (root,),
        ).fetchone()
        return StoredRelease(*row) if row else None

    def roots(self, base: str = "") -> list[str]:
        """Where verified Release files lie, below `base`."""
        rows = self._db.execute("SELECT root FROM release ORDER BY root").fetchall()
        return [root for (root,) in rows if not base or root == base or root.startswith(base + "/")]

    def root_of(self, location: str) -> str | None:
        """The Release root that `location` lies below: the longest."""
        found = [root for root in self.roots() if location.startswith(root + "/")]
        return max(found, key=len, default=None)

    def put_release(self, stored: StoredRelease, release: Release) -> None:
        """Take a verified Release for its root's current one."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO release VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(stored.root, stored.date, stored.valid_until, stored.fetched, stored.modified),
                    *(stored.inline, stored.text, stored.signature),
                ),
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO listed VALUES (?, ?, ?, ?, ?, ?)",
                [(stored.root, item.path, item.size, item.sha256, item.sha512, release.date) for item in release.files],
            )
            dates = self._db.execute(
                "SELECT DISTINCT date FROM listed WHERE root = ? ORDER BY date DESC LIMIT ?",
                (stored.root, GENERATIONS),
            ).fetchall()
            self._db.execute(
                "DELETE FROM listed WHERE root = ? AND date < ?", (stored.root, dates[-1][0] if dates else 0)
            )

    def confirm_release(self, root: str) -> None:
        """The upstream says that the stored one is still its newest."""
        self._db.execute("UPDATE release SET fetched = ? WHERE root = ?", (time.time(), root))

    def listed(self, root: str, path: str) -> Known | None:
        """The file of the current Release, by its path, or by-hash (also of earlier ones)."""
        directory, by_hash, rest = path.rpartition("/by-hash/")
        if by_hash:
            kind, _, digest = rest.partition("/")
            column = {"SHA256": "sha256", "SHA512": "sha512"}.get(kind)
            if column is None:
                return None
            rows = self._db.execute(
                f"SELECT path, size, sha256 FROM listed WHERE root = ? AND {column} = ? ORDER BY date DESC",
                (root, digest.lower()),
            ).fetchall()
            rows = [row for row in rows if row[0].rpartition("/")[0] == directory]
        else:
            rows = self._db.execute(
                "SELECT path, size, sha256 FROM listed JOIN release USING (root, date) WHERE root = ? AND path = ?",
                (root, path),
            ).fetchall()
        return Known(f"{root}/{rows[0][0]}", rows[0][1], rows[0][2]) if rows else None

    def listed_below(self, root: str) -> list[str]:
        """Paths of all files of the current Release."""
        rows = self._db.execute("SELECT path FROM listed JOIN release USING (root, date) WHERE root = ?", (root,))
        return [path for (path,) in rows]

    # --- files of indexes ---

    def file(self, location: str) -> Known | None:
        row = self._db.execute("SELECT location, size, sha256 FROM file WHERE location = ?", (location,)).fetchone()
        return Known(*row) if row else None

    def locations(self, sha256: str) -> list[str]:
        rows = self._db.execute("SELECT location FROM file WHERE sha256 = ?", (sha256,)).fetchall()
        return [location for (location,) in rows]

    def is_signed(self, sha256: str) -> bool:
        """Does anything that was verified name this content?"""
        query = "SELECT 1 FROM file WHERE sha256 = ? UNION SELECT 1 FROM listed WHERE sha256 = ? LIMIT 1"
        return self._db.execute(query, (sha256, sha256)).fetchone() is not None

    def parsed(self, location: str) -> str | None:
        """The SHA-256 of the index at `location` whose files are known."""
        row = self._db.execute("SELECT sha256 FROM parsed WHERE location = ?", (location,)).fetchone()
        return str(row[0]) if row else None

    def put_files(self, rows: Iterable[FileRow], origin: str, sha256: str) -> int:
        """Add what the index at `origin`, with this SHA-256, names; returns how many files those are."""
        now = time.time()
        count = 0

        def values() -> Iterator[tuple[str, int, str, str, str, float]]:
            nonlocal count
            for row in rows:
                count += 1
                yield (row.location, row.size, row.sha256, row.name, origin, now)

        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?)", values())
            self._db.execute("INSERT OR REPLACE INTO parsed VALUES (?, ?, ?)", (origin, sha256, now))
        return count

    def newest_of(self, origin: str, names: Iterable[str]) -> list[Known]:
        """The files called `names` in the index at `origin`, as it was read last."""
        found: list[Known] = []
        for name in names:
            rows = self._db.execute(
                "SELECT file.location, size, file.sha256 FROM file, parsed "
                "WHERE name = ? AND origin = ? AND parsed.location = origin AND seen >= parsed.at",
                (name, origin),
            ).fetchall()
            found += [Known(*row) for row in rows]
        return found

    def name_of(self, sha256: str) -> str | None:
        row = self._db.execute("SELECT name FROM file WHERE sha256 = ? AND name != '' LIMIT 1", (sha256,)).fetchone()
        return str(row[0]) if row else None

    def random(self, count: int, largest: int) -> list[Known]:
        """Files nobody asked for, by chance; none over `largest` bytes."""
        rows = self._db.execute(
            "SELECT location, size, sha256 FROM file WHERE name != '' AND size <= ? ORDER BY RANDOM() LIMIT ?",
            (largest, count),
        ).fetchall()
        return [Known(*row) for row in rows]

    def count(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM file").fetchone()[0])

    def below(self, base: str) -> Iterator[Known]:
        """All files of indexes below `base`."""
        cursor = self._db.execute(
            "SELECT location, size, sha256 FROM file WHERE location >= ? AND location < ? ORDER BY location",
            (f"{base}/", f"{base}0"),
        )
        for row in cursor:
            yield Known(*row)

    def forget(self, older_than: float) -> int:
        """Drop files no index has named since `older_than` (Unix time); returns how many."""
        return self._db.execute("DELETE FROM file WHERE seen < ?", (older_than,)).rowcount
