"""pacman's repositories: database -> SHA-256 and detached signature of each package.

The database is not signed (unless the repository does so), so it comes from the repository's own
server, never from a peer; what it says of a package only counts together with the package's signature,
which is checked by the keys that pacman trusts, by pacman's rule: a good signature of a key that is
fully trusted (alpm's SigLevel Required TrustedOnly).

Clients ask for `/pacman/REPOSITORY/ARCHITECTURE/FILE`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hostos.mirror.apt import once, read_index
from hostos.mirror.catalogue import Catalogue, Known
from hostos.mirror.contents import Contents, Wanted
from hostos.mirror.documents import Document, Fetcher
from hostos.mirror.errors import MissingError, RefusedError, UnreachableError, UnverifiedError
from hostos.mirror.location import to_url
from hostos.mirror.signatures import status_of
from hostos.mirror.upstreams import Pacman
from hostos.paths import private_dir

MAX_DATABASE = 256 << 20
MAX_SIGNATURE = 64 << 10
FRESH_S = 2.0
_DATABASE = re.compile(r"(.+)\.(db|files)(\.sig)?")


@dataclass
class PacmanRepositories:
    """`directory`: for databases and for signatures that were found good."""

    directory: Path
    catalogue: Catalogue
    contents: Contents
    fetcher: Fetcher
    log: Callable[[str], None]
    offline: bool = False
    indexed: Callable[[str], None] = lambda _: None
    _running: dict[str, asyncio.Task[Document]] = field(default_factory=dict)
    _one_reader: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    async def resolve(self, location: str, entry: Pacman) -> Document | Wanted:
        """What stands at `location`. Raises RefusedError."""
        name = location[len(entry.base) + 1 :]
        if "/" in name:
            raise MissingError(f"{location}: a pacman repository has no directories")
        if found := _DATABASE.fullmatch(name):
            if found[1] != entry.repository:
                raise MissingError(f"{location}: the database is called {entry.repository}.db")
            return await once(self._running, location, lambda: self._database(entry, name))
        if name.endswith(".sig"):
            return await self._signature(location.removesuffix(".sig"), entry)
        return await self._package(location, entry)

    async def _package(self, location: str, entry: Pacman) -> Wanted:
        known = self.catalogue.file(location)
        if known is None:
            database = f"{entry.repository}.db"
            await once(self._running, f"{entry.base}/{database}", lambda: self._database(entry, database))
            known = self.catalogue.file(location)
        if known is None:
            raise MissingError(f"the database of {entry.repository} does not name {location}")
        name = location[len(entry.base) + 1 :]
        checked = known

        async def confirm(path: Path) -> None:
            await self._check(path, checked, entry, name)

        if self.contents.held(known) is not None and not self._good(known).exists():
            # There by another way, e.g. in a store whose signatures were removed.
            await confirm(self.contents.store.path(known.sha256))
        return Wanted(known, tuple(to_url(server, name) for server in entry.servers), entry.base, confirm=confirm)

    def _good(self, known: Known) -> Path:
        return private_dir(self.directory / "signatures") / known.sha256

    async def _check(self, path: Path, known: Known, entry: Pacman, name: str) -> None:
        """Raises UnverifiedError unless the package has a good signature; keeps the signature."""
        try:
            signature = (await self._from_servers(entry, f"{name}.sig", MAX_SIGNATURE)).body
        except MissingError:
            raise UnverifiedError(f"{known.location} is not signed") from None
        await verify(path, signature, entry.keys, known.location)
        self._good(known).write_bytes(signature)

    async def _signature(self, package: str, entry: Pacman) -> Document:
        """The signature of a package, which is only known to be good together with it."""
        wanted = await self._package(package, entry)
        await self.contents.obtain(wanted)
        return Document(self._good(wanted.known).read_bytes())

    async def _from_servers(self, entry: Pacman, name: str, largest: int, modified: str = "") -> Document:
        """From the first server that has it; one that has not changed is an empty document."""
        if self.offline:
            raise UnreachableError(f"{entry.base}/{name} is not in the cache, which is offline")
        problem: RefusedError | None = None
        for server in entry.servers:
            try:
                found = await self.fetcher.get(to_url(server, name), largest, modified)
                return found or Document(b"", modified)
            except RefusedError as error:
                problem = problem if isinstance(problem, MissingError) else error
        raise problem or MissingError(f"{entry.repository} has no server")

    async def _database(self, entry: Pacman, name: str) -> Document:
        """The newest one that the servers have; where none answers, what was there last."""
        file = private_dir(self.directory / "databases") / f"{entry.repository}-{entry.architecture}-{name}"
        about = file.with_name(f"{file.name}.json")
        stored = _read(file, about)
        if stored and (self.offline or time.time() - about.stat().st_mtime < FRESH_S):
            return stored
        try:
            found = await self._from_servers(entry, name, MAX_DATABASE, stored.modified if stored else "")
        except UnreachableError as error:
            if stored is None:
                raise
            self.log(f"{entry.base}/{name}: {error.reason}; what was there before is served")
            return stored
        if not found.body and stored:
            os.utime(about)
            return stored
        if not name.endswith(".sig"):
            await self._check_database(entry, name, found.body)
        file.write_bytes(found.body)
        about.write_text(json.dumps({"schema": 1, "modified": found.modified}) + "\n")
        if name.endswith(".db"):
            location = f"{entry.base}/{name}"
            sha256 = hashlib.sha256(found.body).hexdigest()
            known = Known(location, len(found.body), sha256)
            base = entry.base
            if await read_index(self.catalogue.path, file, known, base, "pacman", self.log, self._one_reader):
                self.indexed(location)
        return found

    async def _check_database(self, entry: Pacman, name: str, body: bytes) -> None:
        """A database that is signed must be signed well; one that has to be and isn't is refused."""
        try:
            signature = await self._from_servers(entry, f"{name}.sig", MAX_SIGNATURE)
        except RefusedError:
            if entry.signed_database:
                raise UnverifiedError(f"{entry.base}/{name} is not signed, as pacman.conf wants it") from None
            return
        with tempfile.NamedTemporaryFile(prefix="hostos-db-") as file:
            file.write(body)
            file.flush()
            await verify(Path(file.name), signature.body, entry.keys, f"{entry.base}/{name}")


def _read(file: Path, about: Path) -> Document | None:
    try:
        return Document(file.read_bytes(), str(json.loads(about.read_text())["modified"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


async def verify(path: Path, signature: bytes, keys: str, what: str) -> None:
    """Raises UnverifiedError unless `signature` is a good one of the file, by a key that the keyring in
    the directory `keys` trusts fully."""
    with tempfile.NamedTemporaryFile(prefix="hostos-sig-") as file:
        file.write(signature)
        file.flush()
        command = ["gpg", "--homedir", keys, "--batch", "--no-permission-warning", "--lock-never"]
        command += ["--no-auto-check-trustdb", "--no-auto-key-retrieve", "--status-fd", "1"]
        status = await status_of([*command, "--verify", file.name, str(path)], what)
    words = {line[0] for line in status if line}
    if "BADSIG" in words:
        raise UnverifiedError(f"{what} has a bad signature")
    if "NO_PUBKEY" in words:
        raise UnverifiedError(f"{what} is signed by an unknown key")
    if not {"GOODSIG", "VALIDSIG"} <= words or words & {"EXPKEYSIG", "REVKEYSIG", "EXPSIG", "ERRSIG"}:
        raise UnverifiedError(f"{what} has no valid signature")
    if not words & {"TRUST_FULLY", "TRUST_ULTIMATE"}:
        raise UnverifiedError(f"{what} is signed by a key that pacman does not trust")
