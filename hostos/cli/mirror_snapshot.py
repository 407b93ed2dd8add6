"""`hostos mirror publish|show|serve`: repositories as images."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hostos.cli.common import human_size, json_option, print_json, steps, talk_options
from hostos.cli.completing import images
from hostos.errors import UserError

if TYPE_CHECKING:
    from hostos.image.store import StoredImage
    from hostos.steps import Steps


@click.command()
@click.argument("repository")
@click.option("--name", required=True, help="Of the image, e.g. debian/bookworm.")
@click.option("--onto", metavar="IMAGE", shell_complete=images,
              help="Make a child of IMAGE that has the snapshot as its package source.")  # fmt: skip
@click.option("--push", "signed", metavar="NAME", help="Let your NAME mean it (hostos name), signed.")
@click.option("--peer", "peers", multiple=True, metavar="HOST:PORT",
              help="With --push: who has the image.  [default: the seed, if others can reach it]")  # fmt: skip
@json_option
@talk_options
def publish(
    repository: str, name: str, onto: str | None, signed: str | None, peers: tuple[str, ...], as_json: bool
) -> None:
    """Make an immutable snapshot of a repository, as an image; prints its hash.

    REPOSITORY is the URL of an apt archive or the name of a pacman repository. The image holds its signed
    indexes and those packages that the cache has, at their places: a package manager can use it as it uses
    the mirror.

    \b
      hostos mirror publish http://deb.example.org/debian --name debian/today --push debian
      hostos mirror serve debian/today         a browser, apt or an installer looks at it
      snapshot = "me/debian"                   in the [base] of a recipe: from it alone
    """
    from hostos.image import seeding
    from hostos.image.publish import publish as publish_image
    from hostos.image.store import Store
    from hostos.mirror import control, snapshot, upstreams
    from hostos.mirror.catalogue import Catalogue
    from hostos.names import push as pushing
    from hostos.names.book import Names
    from hostos.names.record import check_name
    from hostos.names.resolve import EXPIRES

    if peers and not signed:
        raise UserError("--peer is for --push", "add --push NAME, or leave it out")
    if signed:
        check_name(signed)
        if Names().key() is None:
            raise UserError("you have no key to sign with", f"hostos name create {signed}")
    archives = upstreams.load() or upstreams.Upstreams()
    base, origin = snapshot.find(repository, archives)
    parent = Store().get(onto) if onto else None
    talk = steps()
    with control.store() as store:
        catalogue = Catalogue(control.data() / "catalogue.db")
        try:
            with snapshot.made(base, origin, catalogue, store) as found:
                talk.note(f"{found.packages} packages of {found.named} that {base} names")
                if parent:
                    from hostos.image.child import publish_child

                    tree = snapshot.as_source(found, origin, archives.keys_of(base))
                    published = publish_child(
                        tree, name, parent, talk, only_changes=True, made_by=f"snapshot of {base}"
                    )
                else:
                    published = publish_image(found.tree, name, talk, architecture=os.uname().machine)
        finally:
            catalogue.close()
    seeding.reload()
    record = pushing.push(published.hash, signed, peers, EXPIRES // 86400)[0] if signed else None
    if as_json:
        number = {"number": record.sequence} if record else {}
        print_json({"schema": 1, "image": published.hash, "packages": found.packages, "named": found.named, **number})
        return
    click.echo(published.hash)
    if record:
        click.echo(f"me/{signed} is {record.image} (number {record.sequence})", err=True)


def _layer(reference: str, told: Steps) -> tuple[StoredImage, Path]:
    """The snapshot and its file, fetched if need be."""
    from hostos.image.layers import torrents
    from hostos.image.store import Store
    from hostos.mirror.pinned import obtain

    store = Store()
    image = obtain(reference, told, store)
    return image, torrents(store, image)[-1][1]


snapshot_argument = click.argument("reference", metavar="SNAPSHOT", shell_complete=images)


@click.command()
@snapshot_argument
@click.option("--all", "everything", is_flag=True, help="Also files that its indexes name and it does not hold.")
@json_option
@talk_options
def show(reference: str, everything: bool, as_json: bool) -> None:
    """List what is in a snapshot: size, SHA-256 and path of each package.

    SNAPSHOT is an image's name or hash, or somebody's signed name (PETNAME/NAME), which is then fetched.
    """
    from hostos.mirror import browsing

    image, layer = _layer(reference, steps())
    entries = browsing.listing(layer)
    held = [each for each in entries if each.held]
    if as_json:
        rows = [vars(each) for each in (entries if everything else held)]
        print_json({"schema": 1, "image": image.hash, "files": rows})
        return
    for each in entries if everything else held:
        click.echo(f"{each.size:10}  {each.sha256[:16]}  {each.path}{'' if each.held else '  (not in it)'}")
    total = human_size(sum(each.size for each in held))
    click.echo(f"{image.hash}: {len(held)} of {len(entries)} files that it names, {total}", err=True)


@click.command()
@snapshot_argument
@click.option("--listen", default="127.0.0.1:3145", show_default=True, metavar="ADDRESS:PORT", help="Where.")
@talk_options
def serve(reference: str, listen: str) -> None:
    """Serve a snapshot over HTTP until Ctrl-C, as a mirror that never changes.

    For browsers, package managers and installers: it has the layout of the repository, which is all they need.
    """
    from hostos.mirror import browsing
    from hostos.mirror.settings import parse_address

    any_port = listen.endswith(":0")
    host, port = parse_address(listen.removesuffix(":0") + ":1" if any_port else listen, "--listen", 3145)
    told = steps()
    image, layer = _layer(reference, told)
    browsing.listing(layer)
    with tempfile.TemporaryDirectory(prefix="hostos-snapshot-", dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
        tree = Path(name) / "tree"
        with told.step("unpack"):
            browsing.unpack(layer, tree)
        browsing.serve(
            tree, host, 0 if any_port else port, lambda url: click.echo(f"serving {image.hash[:16]} on {url}", err=True)
        )


COMMANDS = (publish, show, serve)
