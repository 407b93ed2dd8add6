"""hostos memory: how much memory a running machine has."""

from __future__ import annotations

from dataclasses import asdict

import click

from hostos.cli.common import json_option, machine_option, print_json
from hostos.machine.instance import Instance


@click.command()
@machine_option
@json_option
@click.argument("size", required=False)
def memory(machine: str, as_json: bool, size: str | None) -> None:
    """Show how much memory a running machine has, or give it SIZE.

    SIZE in MiB, or e.g. 2G: at most what it was started with (up --memory); what is taken goes back to this host.
    For machines started with --reclaim.
    """
    from hostos.machine import balloon

    instance = Instance.load(machine)
    has = balloon.resize(instance, size) if size else balloon.look(instance)
    if as_json:
        print_json({"schema": 1, "machine": machine, **asdict(has)})
    else:
        click.echo(f"{has.now_mib} of {has.most_mib} MiB")
