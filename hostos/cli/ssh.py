"""hostos ssh, cp, ssh-config: the system's OpenSSH, told where the machines are."""

from __future__ import annotations

import os
import sys

import click

from hostos.cli.common import machine_option
from hostos.errors import UserError
from hostos.machine.instance import Instance


class SshCommand(click.Command):
    """`[-m NAME] [SSH OPTION…] [--] [COMMAND…]`: only -m and -h are ours (hostos.machine.ssh_words)."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from hostos.machine.ssh_words import split

        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        words = split(args)
        if words.help:
            return super().parse_args(ctx, ["--help"])
        rest = super().parse_args(ctx, ["--machine", words.machine] if words.machine is not None else [])
        ctx.params["words"] = words
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[-m NAME] [SSH OPTION]... [--] [COMMAND]..."]


@click.command(cls=SshCommand)
@machine_option
def ssh(machine: str, words: object) -> None:
    """Open a shell in the guest, or run COMMAND there, with the system's ssh.

    \b
    ssh's own options come before the command:
      hostos ssh -L 8080:localhost:80       port 8080 here leads to port 80 in the guest
      hostos ssh -NR 3000:localhost:3000    port 3000 in the guest leads here
      hostos ssh -A                         lets the guest use your agent while you are in it
      hostos ssh -t htop                    with a terminal
      hostos ssh -- 'cd /tmp && ls'         one word is shell text, several arrive as they are

    The exit status is the command's, or 255 if ssh itself failed.
    """
    from hostos.machine.ssh import ssh_command
    from hostos.machine.ssh_words import SshWords

    assert isinstance(words, SshWords)
    instance = Instance.load(machine)
    started = instance.require_running()
    if started.reached != "system":
        why = "does not take hostos's key" if started.reached == "ssh" else "had no SSH server when it was started"
        raise UserError(
            f"the guest of machine {machine!r} {why}",
            f"hostos console -m {machine}; with a key of yours: ssh -p {started.ssh_port} USER@127.0.0.1",
        )
    _become(ssh_command(instance, words))


@click.command()
@machine_option
@click.option("-r", "--recursive", is_flag=True, help="Directories and all that is in them.")
@click.option("-p", "--preserve", is_flag=True, help="Keep times and modes.")
@click.option("-q", "--quiet", is_flag=True, help="No progress meter.")
@click.argument("paths", nargs=-1, required=True, metavar="SOURCE... TARGET")
def cp(machine: str, recursive: bool, preserve: bool, quiet: bool, paths: tuple[str, ...]) -> None:
    """Copy files into a guest, out of it, or from one to another, with the system's scp.

    \b
    A path in the guest begins with a colon, or with a machine's name and a colon:
      hostos cp notes.txt :/tmp/            into machine "default"
      hostos cp -r :/etc/systemd .          out of it, a whole directory
      hostos cp ':/var/log/*.log' logs/     patterns work
      hostos cp one:/etc/motd two:/etc/     from machine to machine
    """
    from hostos.machine.copy import scp_command

    _become(scp_command(paths, machine, recursive=recursive, preserve=preserve, quiet=quiet))


@click.command(name="ssh-config")
@click.option("-m", "--machine", metavar="NAME", help="Print this machine's configuration.")
@click.option("--path", is_flag=True, help="Print the path of the file that has all machines.")
@click.option("--install", is_flag=True, help="Let ~/.ssh/config include it.")
@click.option("--remove", is_flag=True, help="Undo --install.")
def ssh_config(machine: str | None, path: bool, install: bool, remove: bool) -> None:
    """Make machines known to ssh, VS Code and every other SSH program.

    Each machine is a host called hostos-NAME. Without options this prints the line for
    ~/.ssh/config that includes them all, also those made later.

    \b
      hostos ssh-config --install && ssh hostos-default
      ssh -F "$(hostos ssh-config --path)" hostos-default
    """
    from hostos.machine import ssh_include
    from hostos.machine.ssh import write_all_machines_config

    if sum([machine is not None, path, install, remove]) > 1:
        raise UserError("-m, --path, --install and --remove exclude each other", "give one of them")
    config = ssh_include.user_config()
    if machine is not None:
        instance = Instance.load(machine)
        if not instance.ssh_config.is_file():
            raise UserError(f"machine {machine!r} was never started", f"hostos up -m {machine}")
        click.echo(instance.ssh_config.read_text(), nl=False)
    elif path:
        click.echo(str(write_all_machines_config()))
    elif install:
        done = ssh_include.install(config)
        click.echo(f"{config} {'includes' if done else 'included'} all machines{'' if done else ' already'}", err=True)
    elif remove:
        done = ssh_include.remove(config)
        click.echo(f"{config} {'includes them no more' if done else 'did not include them'}", err=True)
    else:
        click.echo(ssh_include.include_line())
        if sys.stdout.isatty():
            click.echo(f"(for {config}, above every Host line; --install puts it there)", err=True)


def _become(line: list[str]) -> None:
    sys.stdout.flush()
    os.execv(line[0], line)
