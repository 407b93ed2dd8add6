"""`hostos image tree|history|diff|squash`: images that inherit from others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hostos.cli.common import human_size, json_option, print_json, steps, talk_options
from hostos.cli.completing import images

if TYPE_CHECKING:
    from hostos.image.store import StoredImage
    from hostos.live.manifest import BootConfig
    from hostos.steps import Steps


def publish_from(
    source: Path,
    name: str,
    parent: str,
    boot: BootConfig | None,
    only_changes: bool,
    piece_size: int | None,
    told: Steps,
) -> str:
    """Publish a child, say so, and return its hash. Raises UserError."""
    from hostos.image.child import publish_child
    from hostos.image.store import Store

    store = Store()
    below = store.get(parent)
    made = publish_child(
        source, name, below, told, boot=boot, only_changes=only_changes, piece_size=piece_size, store=store
    )
    announce(store.get(made.hash), made.packed.size)
    return made.hash


def announce(image: StoredImage, new: int) -> None:
    """The hash on stdout; on stderr what is new, and what to do with it."""
    from hostos.image import seeding

    after = "seeding it already" if seeding.reload() else "offer it with: hostos seed start"
    click.echo(image.hash)
    total = f"{human_size(new)} new of {human_size(image.manifest.size)} in {len(image.manifest.layers)} layers"
    click.echo(f"{image.name}: {total}, {image.manifest.architecture}; {after}", err=True)


@click.command()
@click.argument("reference", metavar="[IMAGE]", required=False, shell_complete=images)
@json_option
def tree(reference: str | None, as_json: bool) -> None:
    """Show which images of this host inherit from which; of IMAGE only its family."""
    from hostos.image.family import family, roots
    from hostos.image.store import Store

    store = Store()
    found = store.images()
    chosen = family(found, store.get(reference)) if reference else found
    if as_json:
        rows = [{"image": item.hash, "name": item.name, "parents": list(item.manifest.parents)} for item in chosen]
        print_json({"schema": 1, "images": rows})
        return
    for root in roots(chosen):
        for line in _branch(root, chosen, "", ""):
            click.echo(line)


def _branch(item: StoredImage, every: list[StoredImage], head: str, below: str) -> list[str]:
    from hostos.image.family import children, own_size

    parent = next((each for each in every if each.hash == (item.manifest.parents or ("",))[0]), None)
    own = own_size(item, parent)
    missing = "" if parent or not item.manifest.parents else f"  (parent {item.manifest.parents[0][:16]} isn't here)"
    lines = [f"{head}{item.name}  {item.hash[:16]}  {human_size(own)}{missing}"]
    following = children(item, every)
    for number, child in enumerate(following):
        last = number == len(following) - 1
        lines += _branch(child, every, below + ("└── " if last else "├── "), below + ("    " if last else "│   "))
    return lines


@click.command()
@click.argument("reference", metavar="IMAGE", shell_complete=images)
@json_option
def history(reference: str, as_json: bool) -> None:
    """Show the layers of IMAGE, the topmost first: what made each, and with which image it came."""
    from hostos.image.family import brought_by
    from hostos.image.store import Store

    store = Store()
    found = store.get(reference)
    names = {item.hash: item.name for item in store.images()}
    owners = brought_by(found, store.images())
    texts = found.manifest.history or ("",) * len(found.manifest.layers)
    rows: list[dict[str, Any]] = [
        {"layer": layer.torrent, "size": layer.size, "image": owner, "name": names.get(owner), "made_by": text}
        for layer, owner, text in zip(found.manifest.layers, owners, texts, strict=True)
    ]
    if as_json:
        print_json({"schema": 1, "image": found.hash, "layers": rows})
        return
    for row in reversed(rows):
        whose = row["name"] or "an image that isn't here"
        click.echo(f"{row['layer'][:16]}  {human_size(row['size']):>10}  {whose:<24}  {row['made_by']}".rstrip())


@click.command()
@click.argument("reference", metavar="IMAGE", shell_complete=images)
@click.argument("other", metavar="[OTHER]", required=False, shell_complete=images)
@json_option
@talk_options
def diff(reference: str, other: str | None, as_json: bool) -> None:
    """List what IMAGE adds (A), changes (C) and deletes (D), compared with OTHER or what its top layer lies on."""
    from hostos.image import child
    from hostos.image.entries import printable
    from hostos.image.store import Store

    store = Store()
    found = child.diff(store, store.get(reference), store.get(other) if other else None, steps())
    if as_json:
        print_json({"schema": 1, "changes": [[kind, printable(path)] for kind, path in found]})
        return
    for kind, path in found:
        click.echo(f"{kind} {printable(path)}")


@click.command()
@click.argument("reference", metavar="IMAGE", shell_complete=images)
@click.option("--down-to", "ancestor", metavar="IMAGE", shell_complete=images,
              help="Leave the layers of this ancestor as they are.  [default: one layer in all]")  # fmt: skip
@click.option("--name", help="What to call the result.  [default: as the image]")
@talk_options
def squash(reference: str, ancestor: str | None, name: str | None) -> None:
    """Make an image of the same tree with fewer layers, and print its hash. IMAGE stays.

    Fewer layers are looked up faster, and an image can have 64 at most; but what is squashed is
    shared with no other image any more.
    """
    from hostos.image import child
    from hostos.image.store import Store

    store = Store()
    found, below = store.get(reference), store.get(ancestor) if ancestor else None
    made = child.squash(store, found, steps(), name=name, down_to=below)
    announce(store.get(made.hash), made.packed.size)


COMMANDS = (tree, history, diff, squash)
