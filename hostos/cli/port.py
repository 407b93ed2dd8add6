"""hostos port: ports of this host that lead into a machine, while it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict

import click

from hostos.cli.common import json_option, machine_option, print_json
from hostos.errors import UserError
from hostos.machine.instance import Instance
from hostos.machine.network import Protocol


@click.group()
def port() -> None:
    """Publish ports of a machine, also while it runs.

    \b
      hostos port add 8080:80                 127.0.0.1:8080 here leads to port 80 of the guest
      hostos port add 0.0.0.0:5353:53/udp     from everywhere, UDP
      hostos port rm 8080
    """


@port.command()
@machine_option
@json_option
@click.argument("ports", nargs=-1, required=True, metavar="[ADDR:]HOST:GUEST[/udp]...")
def add(machine: str, as_json: bool, ports: Sequence[str]) -> None:
    """Publish ports: HOST of this host leads to GUEST in the guest.

    On 127.0.0.1 unless ADDR says otherwise. All or none are published. They stay published over restarts until
    `port rm`; a machine that doesn't run gets them at its next start.
    """
    from hostos.machine import ports as published
    from hostos.machine.network import parse_publish

    instance = Instance.load(machine)
    forwards = [parse_publish(text) for text in ports]
    running = published.add(instance, forwards)
    if as_json:
        _print(instance)
    elif not running:
        click.echo(f"machine {machine!r} is not running: published at its next start", err=True)


@port.command()
@machine_option
@json_option
@click.argument("ports", nargs=-1, required=True, metavar="HOST[/udp]...")
def rm(machine: str, as_json: bool, ports: Sequence[str]) -> None:
    """Withdraw ports of this host. Connections that exist stay open."""
    from hostos.machine import ports as published

    instance = Instance.load(machine)
    for number, protocol in [_parse(text) for text in ports]:
        published.remove(instance, number, protocol)
    if as_json:
        _print(instance)


@port.command()
@machine_option
@json_option
def ls(machine: str, as_json: bool) -> None:
    """List published ports, ADDR:HOST:GUEST/PROTOCOL."""
    from hostos.machine import ports as published

    instance = Instance.load(machine)
    if as_json:
        _print(instance)
        return
    for forward in published.published(instance):
        click.echo(str(forward))


def _print(instance: Instance) -> None:
    from hostos.machine import ports as published

    listed = [asdict(forward) for forward in published.published(instance)]
    print_json({"schema": 1, "machine": instance.name, "publish": listed})


def _parse(text: str) -> tuple[int, Protocol]:
    """`8080`, `8080/udp`, or as it was given to `add`. Raises UserError."""
    match = re.fullmatch(r"(?:[0-9.]+:)?([0-9]{1,5}):[0-9]{1,5}(?:/(tcp|udp))?|([0-9]{1,5})(?:/(tcp|udp))?", text)
    if not match:
        raise UserError(f"{text!r} is not a port of this host", "e.g. hostos port rm 8080, or 8080/udp")
    number, protocol = (match[1], match[2]) if match[1] else (match[3], match[4])
    return int(number), "udp" if protocol == "udp" else "tcp"
