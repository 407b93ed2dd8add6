"""Lets a name of one's own mean an image."""

from __future__ import annotations

import time
from contextlib import ExitStack

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hostos.errors import UserError, failure
from hostos.live.torrents import parse_peer
from hostos.names.book import Names
from hostos.names.record import MAX_PEERS, Record, check_name
from hostos.names.sources import Dht


def push(image: str, name: str, peers: tuple[str, ...], days: int, names: Names | None = None) -> tuple[Record, int]:
    """Sign the next record; it, and how many DHT nodes took it (0 if none was chosen).

    Raises UserError: no key yet, too many peers; a failure if the DHT that was chosen takes nothing (the record
    is signed and counts all the same: pushing again tries again).
    """
    names = names or Names()
    check_name(name)
    key, public = names.key(), names.public_key()
    if key is None or public is None:
        raise UserError("you have no key to sign with", f"hostos name create {name}")
    named = tuple(parse_peer(peer) for peer in peers) or _seed()
    if len(named) > MAX_PEERS:
        raise UserError(f"{len(named)} peers; a record has at most {MAX_PEERS}", "name fewer --peer")
    nodes, number = names.book().dht, names.number(public, name)
    with ExitStack() as stack:
        dht = stack.enter_context(Dht(nodes)) if nodes else None
        if dht is not None:
            # There may be a copy of the key: what it signed elsewhere is still the highest for others.
            number = max(number, _known_to(dht, public, name))
        at = int(time.time())
        record = Record(public, name, number + 1, image, at, at + days * 86400, named).sign(key)
        record.to_json()
        names.accept(record, public, name)
        return record, dht.put(key, name, record.to_json()) if dht else 0


def put_again(dht: Dht, key: Ed25519PrivateKey, record: Record) -> int:
    """Have the DHT keep a record that was pushed before; how many of its nodes took it.

    Raises a failure if none did, or if the DHT has a later one. Its nodes would not refuse the older one by
    themselves: they compare BEP 44's numbers, and libtorrent takes one more than it finds, whatever is put.
    """
    if (known := _known_to(dht, record.key, record.name)) > record.sequence:
        raise failure(
            f"the DHT has number {known}, later than the {record.sequence} that is known here: not put there",
            "the key is used in two places: push here again, and this host's number is the highest",
        )
    return dht.put(key, record.name, record.to_json())


def _known_to(dht: Dht, key: str, name: str) -> int:
    """The number of the record that the DHT has; 0 if it has none that is right."""
    data = dht.get(key, name)
    try:
        return Record.parse(data).verified(key, name).sequence if data else 0
    except UserError:
        return 0


def _seed() -> tuple[str, ...]:
    """The seed's address, if it listens where others can reach it."""
    from hostos.image import seeding

    running = seeding.status()
    if running is None or running.host.startswith("127.") or running.host in ("::1", "0.0.0.0", "::"):
        return ()
    return (running.address,)
