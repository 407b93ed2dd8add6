"""From `steve/gaming` to an image's hash: asked, proved, pinned."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from functools import partial

from hostos.errors import UserError, failure
from hostos.names.book import Names, Person
from hostos.names.record import Record, check_name
from hostos.names.sources import Dht, ask_all, from_web

_REFERENCE = re.compile(r"([a-z0-9][a-z0-9._-]{0,63})/([a-z0-9][a-z0-9._-]{0,63})(?:@(\d{1,19}))?")
EXPIRES = 90 * 86400
"""Seconds a record is good for, unless its owner says otherwise."""


@dataclass(frozen=True)
class Resolved:
    """`record`: the one that counts; `asked`: where it came from (nobody: it was known); `warnings`: for people."""

    person: Person
    record: Record
    asked: str = ""
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        record = self.record
        day = time.strftime("%Y-%m-%d", time.gmtime(record.at))
        ends = time.strftime("%Y-%m-%d", time.gmtime(record.expires))
        whose = f"{self.person.petname}/{record.name}"
        return f"{whose} is {record.image} (number {record.sequence} of {day}, good until {ends})"


def parse(text: str, names: Names) -> tuple[Person, str, int | None] | None:
    """Whose name, which, and which number of it; None if `text` is no name of somebody in the book."""
    match = _REFERENCE.fullmatch(text)
    person = names.person(match[1]) if match else None
    if match is None or person is None:
        return None
    return person, match[2], int(match[3]) if match[3] else None


def resolve(text: str, names: Names | None = None) -> Resolved | None:
    """What `PETNAME/NAME[@NUMBER]` means; None if it is no name of somebody in the book.

    Asks the person's sources and the DHT nodes in the book; what they say is verified, the highest number counts
    and is pinned. If nobody answers, what is pinned counts. Raises UserError.
    """
    names = names or Names()
    if (parsed := parse(text, names)) is None:
        return None
    person, name, number = parsed
    check_name(name)
    if number is not None:
        return Resolved(person, _numbered(names, person, name, number))
    warnings: list[str] = []
    best: tuple[Record, str] | None = None
    refused: UserError | None = None
    for who, data, why in ask_all(_questions(names, person, name)):
        if why:
            warnings.append(f"{who}: {why}")
        if data is None:
            continue
        try:
            record = Record.parse(data).verified(person.key, name)
        except UserError as error:
            refused = refused or error
            warnings.append(f"{who}: {error.message}")
            continue
        if best is None or record.sequence > best[0].sequence:
            best = record, who
    last = names.last(person.key, name)
    if best is not None:
        try:
            return _warned(Resolved(person, names.accept(best[0], person.key, name), best[1], warnings))
        except UserError as error:
            # Old news from an honest source looks the same: what is known counts, and it is said.
            if last is None or best[0].sequence >= last.sequence:
                raise
            warnings.append(f"{best[1]}: {error.message}")
    if last is not None:
        if best is None and person.sources:
            warnings.append(f"nobody was reached: {text} as it was known here last")
        return _warned(Resolved(person, last, "", warnings))
    if refused is not None:
        raise failure(f"{text}: {refused.message}", refused.hint)
    why = "; ".join(warnings) or "nobody to ask"
    hint = f"say where {person.petname}'s are: hostos name add {person.petname} KEY --at URL"
    raise failure(f"no record of {text} was found: {why}", hint)


def _warned(found: Resolved) -> Resolved:
    if found.record.expired:
        when = time.strftime("%Y-%m-%d", time.gmtime(found.record.expires))
        found.warnings.append(f"its record expired on {when}: there may be a newer one that is kept from you")
    return found


def _questions(names: Names, person: Person, name: str) -> list[tuple[str, partial[bytes | None]]]:
    found = [(source, partial(from_web, source, person.key, name)) for source in person.sources]
    if nodes := names.book().dht:
        found.append(("the DHT", partial(_from_dht, nodes, person.key, name)))
    return found


def _from_dht(nodes: tuple[str, ...], key: str, name: str) -> bytes | None:
    with Dht(nodes) as dht:
        return dht.get(key, name)


def _numbered(names: Names, person: Person, name: str, number: int) -> Record:
    known = names.log(person.key, name)
    found = next((record for record in known if record.sequence == number), None)
    if found is None:
        have = ", ".join(str(record.sequence) for record in known) or "none"
        raise UserError(
            f"number {number} of {person.petname}/{name} was never seen here; known: {have}", "hostos name log"
        )
    return found
