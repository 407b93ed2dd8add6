"""hostos console, logs: what the guest says."""

from __future__ import annotations

import shutil
import sys

import click

from hostos.cli.common import machine_option
from hostos.errors import UserError
from hostos.machine.instance import Instance

# A guest that powers off closes its connections some time before QEMU ends.
_LAST_MOMENTS = 20.0


@click.command()
@machine_option
@click.option("--detach-key", metavar="KEY", help="Typed to leave, e.g. ctrl-o.  [default: ctrl-]]")
def console(machine: str, detach_key: str | None) -> None:
    """Connect this terminal to the guest's serial console; Ctrl-] leaves.

    It works from the first byte of a start on (in another terminal, while hostos up waits) and
    when SSH doesn't. A root shell waits there once the guest is up. Every key goes to the guest,
    Ctrl-C too. A serial line knows no window size: type `stty rows R cols C`.
    """
    from hostos import config
    from hostos.machine.console import attach, parse_key

    detach_key = detach_key or str(config.get("console.detach_key"))
    key = parse_key(detach_key)
    size = shutil.get_terminal_size()
    words = f"{detach_key} leaves; for full-screen programs: stty rows {size.lines} cols {size.columns}"
    ended = attach(Instance.load(machine), key, lambda: click.echo(words, err=True))
    click.echo(f"\r\nmachine {machine!r} has ended" if ended == "ended" else "\r\ndetached", err=True)


@click.command(context_settings={"ignore_unknown_options": False})
@machine_option
@click.option("--serial", "source", flag_value="serial", default=True, help="The guest's console (default).")
@click.option("--journal", "source", flag_value="journal", help="The guest's journal (it must be running).")
@click.option("--qemu", "source", flag_value="qemu", help="What QEMU said.")
@click.option("-n", "--lines", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on until the machine ends.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[-- JOURNALCTL OPTION...]")
def logs(machine: str, source: str, lines: int | None, follow: bool, words: tuple[str, ...]) -> int:
    """Print a machine's logs.

    \b
      hostos logs -f                            the console, from the first line of the last start
      hostos logs --journal -n 20 -- -u ssh     journalctl's own options after --

    Console and QEMU logs stay after the machine has ended; its journal is gone with it.
    """
    instance = Instance.load(machine)
    if source == "journal":
        return _journal(instance, lines, follow, words)
    if words:
        raise UserError(f"{words[0]!r} is for journalctl", "hostos logs --journal -- OPTION…")
    from hostos.machine.logs import show

    try:
        show(instance, instance.serial_log if source == "serial" else instance.qemu_log, lines=lines, follow=follow)
    except FileNotFoundError:
        raise UserError(f"machine {machine!r} has no {source} log yet", f"hostos up -m {machine}") from None
    return 0


def _journal(instance: Instance, lines: int | None, follow: bool, words: tuple[str, ...]) -> int:
    from hostos.machine.connection import ConnectionLost, connect

    command = ["journalctl", "--boot", "--no-pager"]
    if lines is not None:
        command.append(f"--lines={lines}")
    elif follow:
        command.append("--no-tail")
    if follow:
        command.append("--follow")
    with connect(instance, deadline=60.0) as guest:
        try:
            return guest.interact([*command, *words], tty=False)
        except ConnectionLost as error:
            # A machine that is powered off takes its journal with it: the end of what was followed.
            process = instance.process()
            if follow and (process is None or process.wait(_LAST_MOMENTS)):
                click.echo(f"machine {instance.name!r} has ended", err=True)
                return 0
            sys.stdout.flush()
            raise UserError(str(error), f"hostos status -m {instance.name}", status=1) from error
