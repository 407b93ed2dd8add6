"""hostos template: the saved machines that starts are made from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from hostos.cli.common import json_option, machine_option, print_json, steps, talk_options
from hostos.errors import UserError, failure
from hostos.machine import template as templates
from hostos.machine.template import Template


@click.group()
def template() -> None:
    """Freshly booted machines on disk from which `hostos up` starts in a fraction of a second.

    \b
    They are made by themselves, in the background, after a machine has booted:
      hostos up                 boots; the template is made
      hostos up -m another      starts from it
      hostos up --cold          boots all the same
    HOSTOS_TEMPLATES=off: none is made or used unless `up --warm` asks for it.
    """


@template.command()
@json_option
def ls(as_json: bool) -> None:
    """List the templates, the one used last first."""
    found = templates.all_templates()
    if as_json:
        print_json([_facts(each) for each in found])
        return
    row = "{:<14} {:>6} {:>5} {:>9} {:<20} {}"
    click.echo(row.format("TEMPLATE", "MIB", "CPUS", "ON DISK", "LAST USED", "OS").rstrip())
    for each in found:
        used = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.used_at))
        facts = each.description
        os_dir = f"{facts.get('os', '')}" + (f"  (not used again: {each.failed})" if each.failed else "")
        size = f"{each.disk_bytes >> 20} MiB"
        click.echo(row.format(each.key[:12], facts.get("memory_mib"), facts.get("cpus"), size, used, os_dir))


@template.command()
@machine_option
@click.option("--os", "os_dir", metavar="DIR", help="OS build.  [default: the machine's]")
@click.option("--memory", type=int, metavar="MIB", help="Memory of the guest.  [default: the machine's]")
@click.option("--cpus", type=int, metavar="N", help="CPUs of the guest.  [default: the machine's]")
@click.option("--force", is_flag=True, help="Make it anew if there is one.")
@click.option("--background", is_flag=True, hidden=True)
@talk_options
def bake(machine: str, os_dir: str | None, memory: int | None, cpus: int | None, force: bool, background: bool) -> None:
    """Make the template for a machine now; prints its directory."""
    from hostos.machine import launcher, process

    if background:
        process.lowest_priority()
    options = launcher.UpOptions(
        os=Path(os_dir).expanduser().absolute() if os_dir else None, memory_mib=memory, cpus=cpus
    )
    wait = 0.0 if background else 300.0
    click.echo(launcher.bake_template(machine, options, steps(), force=force, wait=wait).directory)


@template.command()
@click.argument("names", nargs=-1, required=True, metavar="TEMPLATE...")
def rm(names: tuple[str, ...]) -> None:
    """Delete templates (any beginning of a name that is unambiguous). Machines made from them go on."""
    found = [_named(name) for name in names]
    for each in dict.fromkeys(found):
        _remove(each)


@template.command()
@click.option("--size", "size_mib", type=click.IntRange(min=0), metavar="MIB",
              help="What may stay, in all.  [default: HOSTOS_TEMPLATE_LIMIT_MIB or 2048]")  # fmt: skip
@json_option
def prune(size_mib: int | None, as_json: bool) -> None:
    """Delete the templates not used for longest, until the rest fits."""
    try:
        removed = templates.prune(templates.limit_bytes() if size_mib is None else size_mib << 20)
    except OSError as error:
        raise failure(f"{error.filename}: {error.strerror}") from error
    if as_json:
        print_json([_facts(each) for each in removed])
        return
    for each in removed:
        click.echo(f"{each.key[:12]}  {each.disk_bytes >> 20} MiB")


def _named(name: str) -> Template:
    found = [each for each in templates.all_templates() if name and each.key.startswith(name)]
    if len(found) != 1:
        what = "there is no template" if not found else "there are several templates"
        raise UserError(f"{what} {name!r}", "hostos template ls")
    return found[0]


def _remove(each: Template) -> None:
    try:
        templates.remove(each)
    except OSError as error:
        raise failure(f"{error.filename}: {error.strerror}") from error


def _facts(each: Template) -> dict[str, Any]:
    kept = ("os", "kernel_version", "memory_mib", "cpus", "qemu", "accelerator", "protocol")
    return {
        "schema": 1,
        "template": each.key,
        "directory": str(each.directory),
        "disk_bytes": each.disk_bytes,
        "made_at": each.made_at,
        "used_at": each.used_at,
        "failed": each.failed or None,
        **{name: each.description.get(name) for name in kept},
    }
