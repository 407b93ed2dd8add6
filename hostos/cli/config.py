"""hostos config: defaults of one's own."""

from __future__ import annotations

import shlex
from typing import Any

import click
from click.shell_completion import CompletionItem

from hostos import config as settings
from hostos.cli.common import json_option, print_json
from hostos.errors import UserError, failure


def _keys(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [
        CompletionItem(key.name, help=key.help) for key in settings.KEYS.values() if key.name.startswith(incomplete)
    ]


def _values(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    key = settings.KEYS.get(str(ctx.params.get("key")))
    if key and key.name in ("machine.keys", "machine.os"):
        return [CompletionItem(incomplete, type="file")]
    return [CompletionItem(choice) for choice in (key.choices if key else ()) if choice.startswith(incomplete)]


@click.group()
def config() -> None:
    """Defaults of your own: what hostos takes when neither you nor the machine's last start say.

    An option that is typed wins over what the machine remembers of its last start, that over
    these settings, and these over what is built in.
    """


@config.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """Show all keys, their values, and where those come from."""
    set_here = settings.load()
    if as_json:
        facts = [
            {"key": key.name, "value": set_here.get(name, key.default), "set": name in set_here, "help": key.help}
            for name, key in settings.KEYS.items()
        ]
        print_json({"schema": 1, "path": str(settings.path()), "keys": facts})
        return
    for name, key in settings.KEYS.items():
        value = _text(set_here.get(name, key.default))
        mark = "*" if name in set_here else " "
        click.echo(f"{mark} {name:<22} {value:<14} {key.help}")
    click.echo(f"* set in {settings.path()}", err=True)


@config.command()
@click.argument("key", shell_complete=_keys)
def get(key: str) -> None:
    """Print the value of KEY (nothing if there is none); a list is printed one a line."""
    value = settings.get(key)
    for each in value if isinstance(value, list) else [] if value is None else [value]:
        click.echo(_text(each))


@config.command(name="set")
@click.argument("key", shell_complete=_keys)
@click.argument("values", nargs=-1, required=True, shell_complete=_values)
def set_(key: str, values: tuple[str, ...]) -> None:
    """Set KEY to a value, or to several for a list.

    \b
      hostos config set machine.memory 2048
      hostos config set machine.keys ~/.ssh/id_ed25519.pub ~/.ssh/work.pub
    """
    from hostos import config_file

    config_file.set_value(key, settings.key(key).parse(values))


@config.command()
@click.argument("key", shell_complete=_keys)
def unset(key: str) -> None:
    """Forget KEY: the built-in default holds again. Works for keys of other versions, too."""
    from hostos import config_file

    if not config_file.unset(key):
        # A key that is neither in the file nor known is a slip of the finger.
        settings.key(key)
        click.echo(f"{key} was not set", err=True)


@config.command()
def path() -> None:
    """Print where the file is (or would be)."""
    click.echo(str(settings.path()))


@config.command()
def edit() -> None:
    """Open the file in $VISUAL or $EDITOR, and check it afterwards."""
    import os
    import subprocess

    from hostos.paths import private_dir

    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    private_dir(settings.path().parent)
    if not settings.path().exists():
        settings.path().write_text("# Defaults of hostos; hostos config list explains the keys.\n")
    try:
        status = subprocess.call([*shlex.split(editor), str(settings.path())])
    except (OSError, ValueError) as error:
        raise UserError(f"{editor} cannot be started: {error}", "EDITOR=nano hostos config edit") from None
    if status:
        raise failure(f"{editor} ended with status {status}")
    settings.load()


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return " ".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)
