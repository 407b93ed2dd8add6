"""hostos disk: a machine's own disk."""

from __future__ import annotations

import click

from hostos.cli.common import json_option, machine_option, print_json
from hostos.machine.instance import Instance


@click.group()
def disk() -> None:
    """Look after the disk of a machine (hostos up --disk SIZE)."""


@disk.command()
@machine_option
@json_option
@click.argument("size")
def grow(machine: str, as_json: bool, size: str) -> None:
    """Make the disk bigger, also while the machine runs.

    SIZE is what it is to have then, e.g. 40G. Disks are never shrunk.
    """
    from hostos.machine import disk as disks
    from hostos.machine import grow as growing

    grown = growing.grow(Instance.load(machine), size)
    if as_json:
        print_json({"schema": 1, "machine": machine, "size": grown.size, "now": grown.now})
    elif grown.now:
        click.echo(f"the disk has {disks.human(grown.size)}", err=True)
    else:
        click.echo(f"the disk has {disks.human(grown.size)} from the machine's next start", err=True)
