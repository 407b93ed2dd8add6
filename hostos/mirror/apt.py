"""apt's archives: InRelease signature -> index -> SHA-256 of each file.

What a client asks for becomes either a document that was verified (a Release file in one of its forms)
or a file with a signed hash, for `contents` to find. Nothing else is answered.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from hostos.mirror import release as releases
from hostos.mirror.catalogue import Catalogue, Known, StoredRelease
from hostos.mirror.contents import Contents, Wanted
from hostos.mirror.documents import PATIENCE_S, SHORT_PATIENCE_S, Document, Fetcher, http_date
from hostos.mirror.errors import MissingError, RefusedError, UnreachableError, UnverifiedError
from hostos.mirror.indexes import COMPRESSIONS, READ_ERRORS, kind_of, read
from hostos.mirror.location import to_url
from hostos.mirror.signatures import Keys, verify_detached, verify_inline
from hostos.mirror.upstreams import Apt

INLINE, TEXT, SIGNATURE = "InRelease", "Release", "Release.gpg"
FRESH_S = 2.0
"""A Release asked for again within this time (s) is not looked at upstream."""
AWAY_S = 15.0
"""A mirror that did not answer is not asked for a Release again within this time (s)."""
LOOK_AGAIN_S = 20.0
"""Indexes are not looked through again within this time (s) for a file that they don't name."""
MAX_SIGNATURE = 1 << 20
SMALL_INDEX = 256 << 10
"""Bytes, packed: read within a few milliseconds."""

Result = TypeVar("Result")


@dataclass
class AptArchives:
    """`find`: the entries of the archive that a location belongs to; `indexed` hears of each index that was
    read (its location)."""

    catalogue: Catalogue
    contents: Contents
    find: Callable[[str], list[Apt]]
    fetcher: Fetcher
    architectures: tuple[str, ...]
    log: Callable[[str], None]
    offline: bool = False
    indexed: Callable[[str], None] = lambda _: None
    _running: dict[str, asyncio.Task[StoredRelease]] = field(default_factory=dict)
    _reading: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _looking: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _looked: dict[str, float] = field(default_factory=dict)
    _away: dict[str, float] = field(default_factory=dict)
    _one_reader: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    async def resolve(self, location: str, entries: Sequence[Apt]) -> Document | Wanted:
        """What stands at `location` of the archive `entries`. Raises RefusedError."""
        base = entries[0].base
        relative = location[len(base) + 1 :]
        directory, _, name = relative.rpartition("/")
        known = self._listed(location, base)
        if known is None and name in (INLINE, TEXT, SIGNATURE):
            return self._document(await self.release(entries, directory), name, location)
        if known is None and (root := self._root(relative, entries)) is not None:
            # A client with fresher lists than ours, or the first one of this suite.
            await self.release(entries, root)
            known = self._listed(location, base)
        known = known or await self._in_indexes(location, entries)
        return self._wanted(known, entries, location)

    def _root(self, relative: str, entries: Sequence[Apt]) -> str | None:
        """The Release directory of an index: a configured one, else `dists/SUITE`."""
        for entry in entries:
            for root in entry.roots():
                if root and relative.startswith(root + "/"):
                    return root
        parts = relative.split("/")
        return "/".join(parts[:2]) if parts[0] == "dists" and len(parts) > 3 else None

    def _listed(self, location: str, base: str) -> Known | None:
        root = self.catalogue.root_of(location)
        if root is None or not (root == base or root.startswith(base + "/")):
            return None
        return self.catalogue.listed(root, location[len(root) + 1 :])

    def _wanted(self, known: Known, entries: Sequence[Apt], location: str) -> Wanted:
        base = entries[0].base
        paths = [location[len(base) + 1 :], known.location[len(base) + 1 :]]
        if self._listed(known.location, base):
            directory = paths[1].rpartition("/")[0]
            # Where a mirror changes under our feet, the old index stays there (Acquire-By-Hash).
            paths.append(f"{directory}/by-hash/SHA256/{known.sha256}")
        hosts = dict.fromkeys(entry.url for entry in entries)
        urls = tuple(to_url(url, path) for path in dict.fromkeys(paths) for url in hosts)
        return Wanted(known, urls, base)

    # --- Release files ---

    async def release(self, entries: Sequence[Apt], directory: str) -> StoredRelease:
        """The newest verified Release below `directory` of the archive; asked upstream once for all who
        want it at the same time. Raises RefusedError."""
        root = "/".join(filter(None, (entries[0].base, directory)))
        return await once(self._running, root, lambda: self._release(entries, directory, root))

    async def _release(self, entries: Sequence[Apt], directory: str, root: str) -> StoredRelease:
        of_suite = [entry for entry in entries if directory in entry.roots()] or list(entries)
        stored = self.catalogue.release(root)
        away = time.monotonic() < self._away.get(entries[0].base, 0.0)
        if stored and (self.offline or away or time.time() - stored.fetched < FRESH_S):
            return self._still_valid(stored, of_suite)
        if self.offline:
            raise UnreachableError(f"{root}/{INLINE} is not in the cache, which is offline")
        try:
            found = await self._fetch(of_suite, directory, root, stored)
        except UnreachableError as error:
            if stored is None:
                raise
            self.log(f"{root}: {error.reason}; what was verified before is served")
            self._away[entries[0].base] = time.monotonic() + AWAY_S
            return self._still_valid(stored, of_suite)
        if found is None:
            assert stored
            self.catalogue.confirm_release(root)
            return self._still_valid(stored, of_suite)
        what = f"{root}/{INLINE if found.inline else TEXT}"
        parsed = releases.parse(found.text, what)
        self._check_time(parsed, what, of_suite)
        if stored and (found.inline, found.text) == (stored.inline, stored.text):
            self.catalogue.confirm_release(root)
            return stored
        if stored and parsed.date < stored.date:
            # A mirror that lags, or somebody who wants old packages installed.
            self.log(f"{what}: of {http_date(parsed.date)}, older than what was verified before: refused")
            self.contents.ledger.count(entries[0].base, refused=1)
            return self._still_valid(stored, of_suite)
        made = StoredRelease(
            root,
            parsed.date,
            parsed.valid_until,
            time.time(),
            found.modified,
            found.inline,
            found.text,
            found.signature,
        )
        self.catalogue.put_release(made, parsed)
        self._looked.pop(entries[0].base, None)
        return made

    async def _fetch(
        self, entries: Sequence[Apt], directory: str, root: str, stored: StoredRelease | None
    ) -> _Fetched | None:
        """A Release whose signature is good; None if the stored one is still the newest."""
        url = "/".join(filter(None, (entries[0].url, directory)))
        count = partial(self.contents.ledger.count, entries[0].base)
        since = stored.modified if stored and stored.inline else ""
        patience = SHORT_PATIENCE_S if stored else PATIENCE_S
        try:
            document = await self.fetcher.get(f"{url}/{INLINE}", releases.MAX_SIZE, since, patience)
        except MissingError:
            document = await self.fetcher.get(f"{url}/{TEXT}", releases.MAX_SIZE)
            assert document
            count(from_mirror=len(document.body))
            try:
                signature = await self.fetcher.get(f"{url}/{SIGNATURE}", MAX_SIGNATURE)
            except MissingError:
                raise UnverifiedError(f"{root}/{TEXT} is not signed") from None
            assert signature
            await _by_any(entries, lambda keys: verify_detached(document.body, signature.body, keys, f"{root}/{TEXT}"))
            return _Fetched(b"", document.body, signature.body, document.modified)
        if document is None:
            return None
        body = document.body
        count(from_mirror=len(body))
        text = await _by_any(entries, lambda keys: verify_inline(body, keys, f"{root}/{INLINE}"))
        return _Fetched(body, text, b"", document.modified)

    def _still_valid(self, stored: StoredRelease, entries: Sequence[Apt]) -> StoredRelease:
        valid_until = any(entry.check_valid_until for entry in entries)
        if valid_until and stored.valid_until is not None and time.time() > stored.valid_until:
            raise UnverifiedError(f"{stored.root}/{INLINE} has expired, and there is none newer")
        return stored

    def _check_time(self, parsed: releases.Release, what: str, entries: Sequence[Apt]) -> None:
        releases.check_time(
            parsed,
            what,
            check_valid_until=any(entry.check_valid_until for entry in entries),
            check_date=any(entry.check_date for entry in entries),
        )

    def _document(self, stored: StoredRelease, name: str, location: str) -> Document:
        body = {INLINE: stored.inline, TEXT: b"" if stored.inline else stored.text, SIGNATURE: stored.signature}[name]
        if not body:
            raise MissingError(f"{location}: the mirror has it in the other form only")
        return Document(body, stored.modified or http_date(stored.date))

    # --- files that an index names ---

    async def _in_indexes(self, location: str, entries: Sequence[Apt]) -> Known:
        known = self.catalogue.file(location)
        if known is None and self._reading:
            await asyncio.gather(*self._reading.values(), return_exceptions=True)
            known = self.catalogue.file(location)
        base = entries[0].base
        if known is None and time.monotonic() - self._looked.get(base, -LOOK_AGAIN_S) >= LOOK_AGAIN_S:
            await once(self._looking, base, lambda: self.read_indexes(entries))
            known = self.catalogue.file(location)
        if known is None:
            raise MissingError(f"nothing signed names {location}")
        return known

    async def read_indexes(self, entries: Sequence[Apt]) -> None:
        """Have the indexes of all configured suites in the catalogue. Faults are logged."""
        for entry in entries:
            for directory in entry.roots():
                try:
                    stored = await self.release(entries, directory)
                    for known in self._indexes(entry, stored.root):
                        await self.contents.obtain(self._wanted(known, entries, known.location))
                        self.learn(known)
                except RefusedError as error:
                    self.log(f"{entry.url} {directory}: {error.reason}")
        await asyncio.gather(*self._reading.values(), return_exceptions=True)
        self._looked[entries[0].base] = time.monotonic()

    def _indexes(self, entry: Apt, root: str) -> list[Known]:
        """The indexes of a suite that `entry` wants and that have not been read."""
        paths = set(self.catalogue.listed_below(root))
        flat = any(directory and root.endswith(directory) for directory in entry.roots()) and "/dists/" not in root
        if flat or root == entry.base:
            wanted = ["Packages", *(["Sources"] if entry.sources else [])]
        else:
            architectures = (*(entry.architectures or self.architectures), "all")
            components = entry.components or ("main",)
            wanted = [f"{component}/binary-{name}/Packages" for component in components for name in architectures]
            if entry.sources:
                wanted += [f"{component}/source/Sources" for component in components]
        found = []
        for path in wanted:
            for compression in COMPRESSIONS:
                full = f"{path}.{compression}" if compression else path
                if full in paths and (known := self.catalogue.listed(root, full)):
                    if self.catalogue.parsed(known.location) != known.sha256:
                        found.append(known)
                    break
        return found

    def learn(self, known: Known) -> None:
        """If it is an index, read it into the catalogue, in the background."""
        kind = kind_of(known.location)
        if kind is None or known.location in self._reading or self.catalogue.parsed(known.location) == known.sha256:
            return
        entries = self.find(known.location)
        if not entries:
            return
        # File names are relative to the URL in sources.list, those of patches to their index.
        base = known.location.rpartition("/")[0] if kind == "diff" else entries[0].base
        task = asyncio.create_task(self._read(known, kind, base))
        self._reading[known.location] = task
        task.add_done_callback(lambda _: self._reading.pop(known.location, None))

    async def _read(self, known: Known, kind: str, base: str) -> None:
        path = self.contents.held(known)
        if path is not None and await read_index(
            self.catalogue.path, path, known, base, kind, self.log, self._one_reader
        ):
            self.indexed(known.location)


async def read_index(
    database: Path, file: Path, known: Known, base: str, kind: str, log: Callable[[str], None], one: asyncio.Semaphore
) -> bool:
    """Run the index reader (a small index needs no process of its own); whether it could read it."""
    if known.size <= SMALL_INDEX:
        try:
            count = await asyncio.to_thread(_read_here, database, file, known, base, kind)
        except READ_ERRORS as error:
            log(f"index {known.location}: {error}")
            return False
        log(f"index {known.location}: {count} files")
        return True
    command = [sys.executable, "-m", "hostos.mirror.indexes", "--database", str(database), "--file", str(file)]
    command += ["--location", known.location, "--base", base, "--kind", kind, "--sha256", known.sha256]
    async with one:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
    if process.returncode != 0:
        log(f"index {known.location}: {output.decode(errors='replace').strip() or 'can not be read'}")
        return False
    log(f"index {known.location}: {output.decode().strip()} files")
    return True


def _read_here(database: Path, file: Path, known: Known, base: str, kind: str) -> int:
    catalogue = Catalogue(database)
    try:
        return read(catalogue, file, known.location, base, kind, known.sha256)
    finally:
        catalogue.close()


@dataclass(frozen=True)
class _Fetched:
    inline: bytes
    text: bytes
    signature: bytes
    modified: str


async def _by_any(entries: Sequence[Apt], verify: Callable[[Keys], Awaitable[Result]]) -> Result:
    """By the keys of one of the entries. Raises UnverifiedError."""
    problem: UnverifiedError | None = None
    for signed_by in dict.fromkeys(entry.signed_by for entry in entries):
        try:
            return await verify(Keys.parse(signed_by))
        except UnverifiedError as error:
            problem = error
    assert problem
    raise problem


async def once(running: dict[str, asyncio.Task[Result]], key: str, work: Callable[[], Awaitable[Result]]) -> Result:
    """The result of `work`, which runs once for all who ask for `key` meanwhile; who stops waiting does
    not stop it."""
    task = running.get(key)
    if task is None:
        task = asyncio.ensure_future(work())
        assert task
        running[key] = task
        task.add_done_callback(lambda _: running.pop(key, None))
    return await asyncio.shield(task)
