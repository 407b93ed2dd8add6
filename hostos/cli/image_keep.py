"""`hostos image pin|unpin|copies|gc|rm`: what stays, who else has it, and what goes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from hostos.cli.common import human_size, json_option, print_json
from hostos.cli.completing import images
from hostos.errors import UserError


@click.command()
@click.argument("references", metavar="IMAGE...", nargs=-1, required=True, shell_complete=images)
def pin(references: tuple[str, ...]) -> None:
    """Keep images: `image rm` refuses them until they are unpinned."""
    _set(references, True)


@click.command()
@click.argument("references", metavar="IMAGE...", nargs=-1, required=True, shell_complete=images)
def unpin(references: tuple[str, ...]) -> None:
    """Let images go again."""
    _set(references, False)


def _set(references: tuple[str, ...], keep: bool) -> None:
    from hostos.image.keeping import Pins
    from hostos.image.store import Store

    store = Store()
    found = [store.get(reference) for reference in references]
    for image in found:
        Pins(store).set(image.hash, keep)
        click.echo(f"{image.name} {'is pinned' if keep else 'is not pinned any more'}", err=True)


def known_peers(peers: Iterable[str], images: Iterable[str]) -> list[str]:
    """Who may have images besides this host: `peers` (else those of the settings), and whom names that mean one of
    them now name. Raises UserError."""
    from hostos import config
    from hostos.image import seeding
    from hostos.live.torrents import parse_peer
    from hostos.names.book import Names

    names, own = Names(), seeding.status()
    named = [parse_peer(peer) for peer in tuple(peers) or tuple(config.get("container.peers") or ())]
    recorded = [peer for image in images for peer in names.peers(image)]
    return [peer for peer in dict.fromkeys((*named, *recorded)) if own is None or peer != own.address]


@click.command()
@click.argument("reference", metavar="IMAGE", shell_complete=images)
@click.option("--peer", "peers", multiple=True, metavar="HOST:PORT", help="Whom to ask (repeatable).")
@json_option
def copies(reference: str, peers: tuple[str, ...], as_json: bool) -> None:
    """Count who has all of IMAGE: this host, and of the peers that are known those who say so. Nothing is fetched.

    Known are those of --peer (or else of the setting container.peers), and those named by a name that means IMAGE.
    """
    from hostos.image import keeping
    from hostos.image.store import Store

    store = Store()
    found = store.get(reference)
    asked = known_peers(peers, [found.hash])
    have = keeping.copies(store.bundle(found.hash), asked)
    here = not found.missing
    if as_json:
        print_json({"schema": 1, "image": found.hash, "here": here, "peers": have, "asked": asked})
        return
    click.echo(len(have) + here)
    if here:
        click.echo("this host has all of it", err=True)
    for peer in asked:
        says = "has all of it" if peer in have else "does not have all of it, or does not answer"
        click.echo(f"{peer} {says}", err=True)
    if len(have) + here == 1:
        click.echo("warning: this is the only known copy", err=True)


@click.command()
@click.option("--days", type=click.IntRange(0, 3650), default=30, show_default=True,
              help="Keep of the build cache what was used in so many days.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def gc(days: int, dry_run: bool) -> None:
    """Remove layers no image has any more, and what builds left behind."""
    from hostos.image import keeping
    from hostos.image.store import Store

    store = Store()
    if store.broken():
        raise UserError("there are broken images, whose layers can't be known", "hostos image ls shows them")
    with store.changing():
        found = keeping.garbage(store, days)
        for each in found:
            click.echo(f"{human_size(each.size):>10}  {each.what}  {each.path}")
        if dry_run:
            return
        free = keeping.collect(found)
    click.echo(f"{human_size(free)} free", err=True)


@click.command()
@click.argument("references", metavar="HASH|NAME...", nargs=-1, required=True, shell_complete=images)
@click.option("--force", is_flag=True, help="Even what is pinned, what a name of yours means, or the last copy.")
@click.option("--peer", "peers", multiple=True, metavar="HOST:PORT", help="Who else may have them (repeatable).")
def rm(references: tuple[str, ...], force: bool, peers: tuple[str, ...]) -> None:
    """Remove images and the layers no other image uses, or indexes (their images stay).

    What is pinned stays, and so does what a name of yours means, as others may look for it. Known peers (--peer,
    those that a name's record names, the setting container.peers) are asked who has it, too: the last known copy
    stays, unless --force says otherwise. When no peer is known, it goes with a warning.
    """
    from hostos.image import indexes, keeping, privacy, seeding
    from hostos.image.store import Store
    from hostos.names.book import Names

    store = Store()
    joined = {reference: indexes.find(store, reference) for reference in references}
    # All of them must exist before the first one goes.
    hashes = [_removable(store, reference) for reference in references if joined[reference] is None]
    names = Names()
    going = [image for image in store.images() if image.hash in hashes]
    for image in going:
        for warning in keeping.check_removable(store, image, names.meaning(image.hash), force=force):
            click.echo(f"warning: {image.name}: {warning}", err=True)
    asked = known_peers(peers, [image.hash for image in going])
    for last in keeping.last_copies(store, going, asked):
        if asked and not force:
            raise UserError(
                f"{last} is not removed: it would be the last known copy ({', '.join(asked)} has not all of it)",
                'have somebody fetch all of it (container.complete = "on"), name who has: --peer; or --force',
            )
        click.echo(f"warning: {last}: this is the last known copy", err=True)
    for each in {found.hash: found for found in joined.values() if found}.values():
        indexes.remove(store, each)
    free = sum(store.remove(item) for item in dict.fromkeys(hashes))
    for item in hashes:
        privacy.forget(item)
    seeding.reload()
    click.echo(f"{human_size(free)} free", err=True)


def _removable(store: Any, reference: str) -> str:
    if any(item.path.name == reference for item in store.broken()):
        return reference
    found = store.get(reference)
    same = [item for item in store.images() if item.name == reference]
    if len(same) > 1:
        raise UserError(f"{len(same)} images are called {reference}", "give its hash: hostos image ls")
    return str(found.hash)


COMMANDS = (pin, unpin, copies, gc, rm)
