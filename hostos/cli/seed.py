"""`hostos seed …`: offer this host's images to guests and peers."""

from __future__ import annotations

import json
from typing import Any

import click

from hostos.cli.swarm import swarm_options, swarm_settings
from hostos.steps import Steps, Talk


class _Started(click.Group):
    """With options and no command it is `start`: `hostos seed --only IMAGE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["start", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Started)
def seed() -> None:
    """Offer the images of this host over BitTorrent, in the background.

    On loopback, for the guests of this host, unless told otherwise; announced nowhere without --lan or --public.
    `hostos seed --only IMAGE` is short for `hostos seed start --only IMAGE`.
    """


@seed.command()
@click.option("--listen", metavar="ADDRESS[:PORT]", help="Default: 127.0.0.1 and the port it had last.")
@swarm_options
@click.option("--only", multiple=True, metavar="IMAGE", help="Offer only this image (repeatable).  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def start(
    listen: str | None,
    lan: bool,
    public: bool,
    upload_limit: str | None,
    encryption: str | None,
    only: tuple[str, ...],
    as_json: bool,
) -> None:
    """Start the seed; returns when it listens. Does nothing if it runs already.

    With --lan or --public others can find it; it then listens on every address unless --listen says where.
    """
    from hostos import config
    from hostos.image import seeding

    listen = listen or config.get("seed.listen")
    upload_limit = upload_limit or config.get("seed.upload_limit")
    swarm = swarm_settings(lan=lan, public=public, encryption=encryption, upload_limit=upload_limit)
    if listen:
        seeding.parse_listen(listen)
    chosen = []
    if only:
        from hostos.image.store import Store

        chosen = sorted({Store().get(reference).hash for reference in only})
    with Steps(Talk()).step("start the seed") as step:
        info = seeding.start(listen, swarm=swarm, only=chosen)
        step.detail = f"{info.address}, {len(info.details['torrents'])} torrents"
    _show(info.details, as_json)


@seed.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(as_json: bool) -> None:
    """What the seed offers, and to how many. Exit code 1 if none runs."""
    from hostos.image import seeding

    info = seeding.status()
    if info is None:
        if as_json:
            click.echo(json.dumps({"schema": 1, "running": False}))
        else:
            click.echo("the seed is not running: hostos seed start", err=True)
        raise click.exceptions.Exit(1)
    _show(info.details, as_json)


@seed.command()
def stop() -> None:
    """Stop the seed, if it runs."""
    from hostos.image import seeding

    click.echo("stopped" if seeding.stop() else "the seed was not running", err=True)


def _show(details: dict[str, Any], as_json: bool) -> None:
    if as_json:
        shown = {key: value for key, value in details.items() if key != "ok"}
        click.echo(json.dumps({**shown, "schema": 1, "running": True}))
        return
    host = f"[{details['host']}]" if ":" in details["host"] else details["host"]
    click.echo(
        f"{host}:{details['port']}  pid {details['pid']}  {details['peers']} peers  {details['uploaded']} B sent"
    )
    for torrent in details["torrents"]:
        line = f"{torrent['kind']:5}  {torrent['hash']}  {torrent['peers']} peers  {torrent['uploaded']} B sent"
        click.echo(line + (f"  {torrent['error']}" if torrent["error"] else ""))
