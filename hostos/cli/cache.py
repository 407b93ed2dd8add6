"""`hostos cache`: what a machine has fetched and keeps for its next containers."""

from __future__ import annotations

import datetime
import json

import click

from hostos.cli.common import json_option, machine_option, steps


@click.group()
def cache() -> None:
    """Look after what a machine has fetched of images.

    It is kept for the next container, and across starts if the machine has a disk (hostos up --disk).
    When it gets too large, the images used longest ago go first.
    """


@cache.command()
@machine_option
@json_option
def ls(machine: str, as_json: bool) -> None:
    """List the images of which something is here, and what each takes."""
    from hostos.cli import live

    with live.guest(machine, steps(), start=False) as guest:
        found = guest.ask("cache")
    if as_json:
        click.echo(json.dumps({key: found[key] for key in ("schema", "limit", "size", "images")}, indent=2))
        return
    rows = [("IMAGE", "NAME", "HERE", "LAST USED", "STATE")]
    for image in found["images"]:
        when = datetime.datetime.fromtimestamp(image["used"]).strftime("%Y-%m-%d %H:%M") if image["used"] else "-"
        state = " ".join(word for word in ("mounted", "pinned") if image[word])
        share = f"{live.megabytes(image['here'])} of {live.megabytes(image['size'])}"
        rows.append((image["image"][:16], image["name"], share, when, state))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows if found["images"] else []:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        click.echo("  ".join([*cells, row[4]]).rstrip())
    live.say(f"{live.megabytes(found['size'])} of at most {live.megabytes(found['limit'])}")


@cache.command()
@machine_option
@click.argument("images", metavar="[IMAGE]...", nargs=-1)
def prune(machine: str, images: tuple[str, ...]) -> None:
    """Remove what no container uses and nobody has pinned, or IMAGEs (names or hashes) even if pinned."""
    from hostos.cli import live

    with live.guest(machine, steps(), start=False) as guest:
        free = guest.ask("prune", images=list(images))["free"]
    live.say(f"{live.megabytes(free)} free")


@cache.command()
@machine_option
@click.argument("image")
@click.option("--off", is_flag=True, help="Let it go again when room is short.")
def pin(machine: str, image: str, off: bool) -> None:
    """Keep what is here of IMAGE (name or hash), however short room gets."""
    from hostos.cli import live

    with live.guest(machine, steps(), start=False) as guest:
        name = guest.ask("pin", image=image, keep=not off)["name"]
    live.say(f"{name} {'may go when room is short' if off else 'stays'}")
