"""hostos restart, suspend, resume, rm, inspect: what becomes of machines that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from hostos.cli.common import print_json, steps, talk_options
from hostos.cli.completing import machines as completed
from hostos.errors import FAILED, UserError
from hostos.machine.files import Unreadable, read_json
from hostos.machine.instance import Instance

_EACH = click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=completed)
_MACHINE = click.option("-m", "--machine", "more", multiple=True, metavar="NAME", help="Which machine. Repeatable.",
                        shell_complete=completed)  # fmt: skip


def named(command: Callable[..., Any]) -> Callable[..., Any]:
    """Any number of machines, as words or by -m: arguments `names` and `more` (see `machines_of`)."""
    return _EACH(_MACHINE(command))


def machines_of(names: Sequence[str], more: Sequence[str]) -> list[str]:
    """Which machines are meant: without any, "default"."""
    return list(dict.fromkeys([*more, *names])) or ["default"]


def for_each(names: list[str], work: Callable[[str], None]) -> None:
    """Do `work` for each; a fault of one does not keep the others from theirs. Raises UserError."""
    faults: list[UserError] = []
    for name in names:
        try:
            work(name)
        except UserError as error:
            if len(names) == 1:
                raise
            faults.append(error)
            click.echo(f"hostos: {error}", err=True)
    if faults:
        status = FAILED if len(faults) < len(names) else faults[0].status
        raise UserError(f"{len(faults)} of {len(names)} machines: see above", "hostos ls", status=status)


@click.command()
@named
@click.option("--cold", is_flag=True, help="Boot; do not start from a template.")
@click.option("--timeout", type=float, help="Seconds to let the guest power off.  [default: 30]")
@talk_options
def restart(names: Sequence[str], more: Sequence[str], cold: bool, timeout: float | None) -> None:
    """Power machines off and start them again, with the options of their last start."""
    from hostos import config
    from hostos.machine import launcher, lifecycle

    timeout = timeout or config.get("timeouts.down")
    options = launcher.UpOptions(warm=False if cold else None)
    for_each(machines_of(names, more), lambda name: _quiet(lifecycle.restart(name, options, steps(), timeout=timeout)))


@click.command()
@named
@talk_options
def suspend(names: Sequence[str], more: Sequence[str]) -> None:
    """Save running machines to disk and end them; `hostos resume` (or `up`) goes on where they were."""
    from hostos.machine import lifecycle

    for_each(machines_of(names, more), lambda name: _quiet(lifecycle.suspend(name, steps())))


@click.command()
@named
@talk_options
def resume(names: Sequence[str], more: Sequence[str]) -> None:
    """Bring suspended machines back."""
    from hostos.machine import lifecycle

    for_each(machines_of(names, more), lambda name: _quiet(lifecycle.resume(name, steps())))


@click.command()
@named
@click.option("-f", "--force", is_flag=True, help="Also what runs or is suspended; what it is doing is lost.")
def rm(names: Sequence[str], more: Sequence[str], force: bool) -> None:
    """Delete machines: their keys, options and logs. Templates and images stay."""
    from hostos.machine import lifecycle

    if not names and not more:
        raise UserError("which machine?", "hostos ls shows all; then: hostos rm NAME...")
    for_each(machines_of(names, more), lambda name: lifecycle.remove(name, force=force))


@click.command()
@named
def inspect(names: Sequence[str], more: Sequence[str]) -> None:
    """Print all there is to know about machines, as JSON: state, options, last start, files."""
    facts = [inspection(Instance.load(name)) for name in machines_of(names, more)]
    print_json(facts[0] if len(facts) == 1 else facts)


def inspection(instance: Instance) -> dict[str, Any]:
    """`hostos status --json` and the content of the machine's files (docs/machine.md)."""
    from hostos.cli.machine import description
    from hostos.machine.suspend import saved_facts

    facts = description(instance)
    for name, path in (("config", instance.config_file), ("run", instance.run_file)):
        try:
            facts[name] = read_json(path)
        except Unreadable as error:
            facts[name] = {"unreadable": str(error)}
    try:
        facts["suspended"] = saved_facts(instance)
    except Unreadable as error:
        facts["suspended"] = {"unreadable": str(error)}
    files = sorted(path for path in instance.directory.rglob("*") if path.is_file())
    facts["files"] = {
        str(path.relative_to(instance.directory)): {"bytes": status.st_size, "on_disk": status.st_blocks * 512}
        for path in files
        if (status := path.stat())
    }
    facts["sockets"] = sorted(str(path) for path in instance.socket_dir.glob("*"))
    return facts


def _quiet(_result: object) -> None:
    """What a function gives back is not printed here."""
