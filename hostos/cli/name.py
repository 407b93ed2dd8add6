"""`hostos name …`: one's own names, and the book of other people's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hostos.cli.common import json_option, print_json
from hostos.cli.completing import images
from hostos.errors import UserError

if TYPE_CHECKING:
    from hostos.names.record import Record


@click.group()
def name() -> None:
    """Names for images that can be moved to newer ones: signed by their owner, checked by everybody.

    \b
      hostos name create gaming                        a name of yours, and your public key
      hostos image push web/mine gaming                let it mean an image
      hostos name add steve <key> --at http://…:6880   somebody else, under a name you choose
      hostos container boot steve/gaming
    """


@name.command()
@click.argument("name_", metavar="NAME")
def create(name_: str) -> None:
    """Claim a name of your own, and print your public key (made the first time).

    Give people the key by a way they trust: with it they check everything you publish.
    """
    from hostos.names.book import Names
    from hostos.names.record import check_name

    check_name(name_)
    names = Names()
    names.make_key()
    key = names.public_key()
    assert key is not None
    if names.last(key, name_):
        raise UserError(f"you have the name {name_} already", f"hostos name log me/{name_}")
    click.echo(key)
    click.echo(f"next: hostos image push IMAGE {name_}", err=True)
    click.echo(f"others: hostos name add YOU {key} --at URL, then boot YOU/{name_}", err=True)
    click.echo(f"keep a copy of {names.root / 'identity'}: nobody can sign for you without it", err=True)


@name.command()
@json_option
def ls(as_json: bool) -> None:
    """List your names, and the people of your book with those of their names that were used here."""
    from hostos.names.book import OWN, Names

    names = Names()
    book, own = names.book(), names.public_key()
    called = {each.key: petname for petname, each in book.people.items()} | ({own: OWN} if own else {})
    records = names.all()
    if as_json:
        people = [{"petname": n, "key": p.key, "sources": list(p.sources)} for n, p in sorted(book.people.items())]
        rows = [{**vars(each), "peers": list(each.peers), "petname": called.get(each.key)} for each in records]
        print_json({"schema": 1, "key": own, "people": people, "names": rows, "dht": list(book.dht)})
        return
    if own:
        click.echo(f"{OWN:16}  {own}")
    for petname, person in sorted(book.people.items()):
        click.echo(f"{petname:16}  {person.key}  {' '.join(person.sources)}".rstrip())
    for record in records:
        whose = called.get(record.key)
        if whose:
            click.echo(_row(f"{whose}/{record.name}", record))


def _row(label: str, record: Record) -> str:
    day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(record.at))
    ends = time.strftime("%Y-%m-%d", time.gmtime(record.expires))
    state = "expired" if record.expired else "good until"
    return f"{label:24}  {record.sequence:>4}  {record.image[:16]}  {day}  {state} {ends}"


@name.command()
@click.argument("petname")
@click.argument("key")
@click.option("--at", "sources", multiple=True, metavar="URL", help="Where their records are (repeatable).")
@click.option("--replace", is_flag=True, help="They have a new key: forget the old one.")
def add(petname: str, key: str, sources: tuple[str, ...], replace: bool) -> None:
    """Call the owner of a public KEY by PETNAME from now on.

    Only you use that name: somebody else may call them differently. A petname that is taken is refused.
    """
    from hostos.names.book import Names, Person
    from hostos.names.record import check_key
    from hostos.names.sources import parse_source

    person = Person(petname, check_key(key), tuple(parse_source(source) for source in sources))
    Names().add(person, replace=replace)
    click.echo(f"{petname} is {person.key[:16]}…; boot {petname}/NAME", err=True)


@name.command()
@click.argument("reference", metavar="PETNAME|NAME")
def rm(reference: str) -> None:
    """Remove somebody from your book, or (me/NAME, or NAME) one of your own names."""
    from hostos.names.book import OWN, Names

    names = Names()
    if reference in names.book().people:
        names.remove(reference)
    else:
        names.forget(reference.removeprefix(f"{OWN}/"))


@name.command()
@click.argument("reference", metavar="PETNAME/NAME")
@json_option
def log(reference: str, as_json: bool) -> None:
    """Show what a name has meant, the latest first. Any of them can be booted: PETNAME/NAME@NUMBER."""
    from hostos.names import resolve
    from hostos.names.book import Names

    names = Names()
    parsed = resolve.parse(reference, names)
    if parsed is None:
        raise UserError(f"{reference!r} is no name of somebody in your book", "hostos name ls; your own are me/NAME")
    person, name_, _ = parsed
    records = names.log(person.key, name_)[::-1]
    if as_json:
        print_json({"schema": 1, "records": [{**vars(each), "peers": list(each.peers)} for each in records]})
        return
    for record in records:
        click.echo(_row(f"{person.petname}/{name_}@{record.sequence}", record))


@name.command()
@click.argument("name_", metavar="NAME")
def export(name_: str) -> None:
    """Print the record of one of your names, to put it on any web server or into a mail."""
    from hostos.names.book import Names

    names = Names()
    record = names.last(names.public_key() or "0" * 64, name_)
    if record is None:
        raise UserError(f"your name {name_!r} means nothing yet", f"hostos image push IMAGE {name_}")
    click.echo(record.to_json().decode())


@name.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
def import_(file: Path) -> None:
    """Take a record that came by mail or disk; whose it is must be in your book, or you.

    Of your own it is for a new host, to which you took your key: the next number is then the one after it.
    """
    from hostos.names.book import OWN, Names
    from hostos.names.record import MAX_RECORD, Record

    try:
        with file.open("rb") as opened:
            record = Record.parse(opened.read(MAX_RECORD + 2))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    names = Names()
    everybody = (*names.book().people.values(), *filter(None, (names.person(OWN),)))
    whose = next((each for each in everybody if each.key == record.key), None)
    if whose is None:
        raise UserError(f"{file} is signed by {record.key[:16]}…, who isn't in your book", "hostos name add WHO KEY")
    names.accept(record, whose.key, record.name)
    click.echo(_row(f"{whose.petname}/{record.name}", record), err=True)


@name.command()
@click.option("--listen", default="127.0.0.1:6880", show_default=True, metavar="ADDRESS:PORT", help="Where.")
def serve(listen: str) -> None:
    """Serve the records of your names over HTTP until Ctrl-C: for `hostos name add YOU KEY --at URL`.

    If you chose DHT nodes (`hostos name dht`), your names are put there every hour, too.
    """
    import threading

    from hostos.image.seeding import parse_listen
    from hostos.names import serve as serving
    from hostos.names.book import Names

    host, port = parse_listen(listen)
    with serving.server(host, port or 6880, Names()) as server:
        click.echo(f"serving on http://{host}:{server.server_port}", err=True)
        stop = threading.Event()

        def warn(text: str) -> None:
            click.echo(f"warning: {text}", err=True)

        threading.Thread(target=serving.republish, args=(Names(), stop, warn), daemon=True).start()
        try:
            server.serve_forever()
        finally:
            stop.set()


@name.command()
@click.argument("nodes", nargs=-1, metavar="HOST:PORT...")
@click.option("--off", is_flag=True, help="Ask no DHT any more.")
def dht(nodes: tuple[str, ...], off: bool) -> None:
    """Choose the DHT nodes that names are published through and looked up with. None by default."""
    from hostos.live.torrents import parse_peer
    from hostos.names.book import Names

    if bool(nodes) == off:
        raise UserError("give nodes, or --off", "hostos name dht 192.168.1.5:6881")
    Names().use_dht(tuple(parse_peer(node) for node in nodes))


@click.command()
@click.argument("reference", metavar="IMAGE", shell_complete=images)
@click.argument("name_", metavar="NAME")
@click.option("--peer", "peers", multiple=True, metavar="HOST:PORT",
              help="Who has the image.  [default: the seed, if others can reach it]")  # fmt: skip
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="How long it is good for.")
def push(reference: str, name_: str, peers: tuple[str, ...], days: int) -> None:
    """Let your NAME mean IMAGE from now on: sign it with the next number, and print the number.

    Whoever asks `hostos name serve` (or the DHT nodes you chose) gets it. The image itself comes from
    `hostos seed start`.
    """
    from hostos.image.store import Store
    from hostos.names import push as pushing
    from hostos.names.book import Names

    found = Store().get(reference)
    if Names().book().dht:
        click.echo("signing it, and putting it into the DHT: up to a minute if nodes are gone", err=True)
    record, nodes = pushing.push(found.hash, name_, peers, days)
    click.echo(record.sequence)
    where = f"; {nodes} DHT nodes have it" if nodes else ""
    click.echo(f"me/{name_} is {record.image} (number {record.sequence}){where}", err=True)
