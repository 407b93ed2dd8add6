"""The `hostos` command. One module per noun; each is imported only when it is used, because
`hostos status` must not pay for libtorrent."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from hostos import __version__
from hostos.cli.common import talk_options
from hostos.errors import UserError
from hostos.machine import root

# command -> module below hostos.cli that defines it (as the attribute of the same name, `-` as `_`)
COMMANDS = {
    "up": "machine",
    "down": "machine",
    "kill": "machine",
    "restart": "lifecycle",
    "suspend": "lifecycle",
    "resume": "lifecycle",
    "rm": "lifecycle",
    "inspect": "lifecycle",
    "run": "machine",
    "ssh": "ssh",
    "cp": "ssh",
    "console": "console",
    "status": "machine",
    "ls": "machine",
    "ip": "machine",
    "port": "port",
    "disk": "disk",
    "memory": "memory",
    "template": "template",
    "logs": "console",
    "ssh-config": "ssh",
    "container": "container",
    "image": "image",
    "export": "export",
    "seed": "seed",
    "pin": "image_keep",
    "unpin": "image_keep",
    "name": "name",
    "mirror": "mirror",
    "cache": "cache",
    "os": "os",
    "doctor": "doctor",
    "config": "config",
    "completion": "completion",
}


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command = getattr(importlib.import_module(f"hostos.cli.{module}"), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="hostos")
@talk_options
def hostos() -> None:
    """Boot a tiny Linux and run containers in it straight from a peer-to-peer network.

    \b
    Quick start:
      invoke build                               build the OS into ./dist
      hostos up --key ~/.ssh/id_ed25519.pub      boot it
      hostos ssh                                 look around
      hostos container boot <hash>               run a container from its hash
    """


def _find_image(image: str, peers: tuple[str, ...], start: bool) -> root.Source:
    from hostos.cli.root import find

    return find(image, peers, start)


def main(argv: list[str] | None = None) -> Any:
    """Entry point. Prints a `UserError` without traceback; 130 on Ctrl-C, 141 on a closed pipe."""
    root.finder = _find_image
    try:
        result = hostos.main(args=argv, standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except UserError as error:
        click.echo(f"hostos: {error}", err=True)
        sys.exit(error.status)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("hostos: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # stdout is gone: keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
