"""What this host knows about names, in `names/` of the data directory.

    identity                 one's own key (32 bytes, hex), mode 0600: who has it can speak as you
    book.json                petnames: what one calls other people's keys, and where their records are
    records/<key>/<name>     every record that was accepted, one a line, the last one valid
    removed/<key>/<name>     the same of one's own names that were removed: their numbers go on

A record is accepted only if it is signed and its number is higher than any before: what was pinned once is
never taken back to something older.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostos.errors import UserError
from hostos.locking import exclusive
from hostos.machine.files import write_atomic
from hostos.names.record import Record, check_key, check_name
from hostos.paths import data_dir, private_dir

SCHEMA = 1
OWN = "me"
"""What one's own key is called."""
LOCK_DEADLINE = 10.0


@dataclass(frozen=True)
class Person:
    """`key`: public, 64 hex digits; `sources`: URLs below which their records are."""

    petname: str
    key: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Book:
    """`dht`: `HOST:PORT` of DHT nodes one chose to ask."""

    people: dict[str, Person] = field(default_factory=dict)
    dht: tuple[str, ...] = ()


class Names:
    def __init__(self, root: Path | None = None) -> None:
        self.root = root or data_dir() / "names"

    # --- one's own key ------------------------------------------------------------------------------

    def key(self) -> Ed25519PrivateKey | None:
        """None if there is none yet. Raises UserError if it can't be read."""
        path = self.root / "identity"
        try:
            return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can't be read: {error}", "restore your copy of it") from None

    def make_key(self) -> Ed25519PrivateKey:
        """The key, made if there is none."""
        with self._lock():
            if (found := self.key()) is not None:
                return found
            made = Ed25519PrivateKey.generate()
            descriptor = os.open(self.root / "identity", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(made.private_bytes_raw().hex() + "\n")
            return made

    def public_key(self) -> str | None:
        found = self.key()
        return found.public_key().public_bytes_raw().hex() if found else None

    # --- people -------------------------------------------------------------------------------------

    def book(self) -> Book:
        """Raises UserError if it is damaged."""
        path = self.root / "book.json"
        try:
            value = json.loads(path.read_bytes())
            if value["schema"] != SCHEMA:
                raise UserError(f"{path} has schema {value['schema']!r}, this hostos knows {SCHEMA}")
            people = {
                name: Person(check_name(name), check_key(each["key"]), tuple(map(str, each["sources"])))
                for name, each in value["people"].items()
            }
            return Book(people, tuple(map(str, value.get("dht", ()))))
        except FileNotFoundError:
            return Book()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error}", "mend it, or move it away and add everybody again") from None

    def person(self, petname: str) -> Person | None:
        """Whoever is called that here; `me`: oneself."""
        if petname == OWN:
            key = self.public_key()
            return Person(OWN, key) if key else None
        return self.book().people.get(petname)

    def add(self, person: Person, *, replace: bool = False) -> None:
        """Raises UserError if somebody else is called that, or that key has another petname."""
        check_name(person.petname)
        if person.petname == OWN:
            raise UserError(f"{OWN!r} is you", "call them something else")
        with self._lock():
            book = self.book()
            other = book.people.get(person.petname)
            if other and other.key != person.key and not replace:
                raise UserError(
                    f"{person.petname} is {other.key[:16]}… in your book, not {person.key[:16]}…",
                    f"add them under another name; or, if {person.petname} has a new key: --replace",
                )
            same = [name for name, each in book.people.items() if each.key == person.key and name != person.petname]
            if same:
                raise UserError(f"that key is {same[0]} in your book already", f"hostos name rm {same[0]} first")
            self._write({**book.people, person.petname: person}, book.dht)

    def remove(self, petname: str) -> None:
        """Raises UserError if nobody is called that. What they signed stays known: no roll-back by adding again."""
        with self._lock():
            book = self.book()
            if petname not in book.people:
                raise UserError(f"nobody is called {petname!r} in your book", "hostos name ls")
            self._write({name: each for name, each in book.people.items() if name != petname}, book.dht)

    def use_dht(self, nodes: tuple[str, ...]) -> None:
        with self._lock():
            self._write(self.book().people, nodes)

    def _write(self, people: dict[str, Person], dht: tuple[str, ...]) -> None:
        listed = {name: {"key": each.key, "sources": list(each.sources)} for name, each in sorted(people.items())}
        data: dict[str, Any] = {"schema": SCHEMA, "people": listed, "dht": list(dht)}
        write_atomic(self.root / "book.json", json.dumps(data, indent=1).encode() + b"\n")

    # --- records ------------------------------------------------------------------------------------

    def log(self, key: str, name: str, where: str = "records") -> list[Record]:
        """Every record that was accepted, the oldest first; each is verified again. Raises UserError."""
        path = self._path(key, name, where)
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [Record.parse(line).verified(key, name) for line in lines if line.strip()]

    def last(self, key: str, name: str) -> Record | None:
        found = self.log(key, name)
        return found[-1] if found else None

    def all(self) -> list[Record]:
        """The last record of every name that is known."""
        found = []
        for path in sorted((self.root / "records").glob("*/*")):
            if (record := self.last(path.parent.name, path.name)) is not None:
                found.append(record)
        return found

    def meaning(self, image: str) -> list[str]:
        """Names of one's own that mean this image now."""
        own = self.public_key()
        return [record.name for record in self.all() if record.key == own and record.image == image]

    def peers(self, image: str) -> list[str]:
        """Who has this image, as those say whose names mean it now."""
        return [peer for record in self.all() if record.image == image for peer in record.peers]

    def accept(self, record: Record, key: str, name: str) -> Record:
        """Pin a record. Raises UserError: forged, older than what is pinned, or another one of the same number."""
        record.verified(key, name)
        with self._lock():
            last = self.last(key, name)
            if last is not None and record.sequence < last.sequence:
                raise UserError(
                    f"{name}: number {record.sequence} was offered, {last.sequence} is known: a roll-back, refused",
                    f"to use an older one anyway: NAME@{record.sequence}",
                )
            if last is not None and record.sequence == last.sequence:
                if record != last:
                    raise UserError(
                        f"{name}: its owner signed two different records as number {record.sequence}: refused",
                        "ask its owner: the key is used in two places, or by somebody else",
                    )
                return last
            path = self._path(key, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            before = path.read_bytes() if path.exists() else b""
            write_atomic(path, before + record.to_json() + b"\n")
        return record

    def forget(self, name: str) -> None:
        """Remove one's own name. Raises UserError if there is none."""
        key = self.public_key() or "0" * 64
        path = self._path(key, name)
        if not path.exists():
            raise UserError(f"you have no name {name!r}", "hostos name ls")
        removed = self._path(key, name, "removed")
        removed.parent.mkdir(parents=True, exist_ok=True)
        path.replace(removed)

    def number(self, key: str, name: str) -> int:
        """The highest that is known, also from before the name was removed; 0 if none is. Raises UserError."""
        return max(
            (each.sequence for where in ("records", "removed") for each in self.log(key, name, where)), default=0
        )

    def _path(self, key: str, name: str, where: str = "records") -> Path:
        return self.root / where / check_key(key) / check_name(name)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        private_dir(self.root)
        with exclusive(self.root / ".lock", LOCK_DEADLINE, f"another process keeps {self.root} locked"):
            yield
