"""Options that many commands have in common, and how they talk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import click

from hostos.cli.completing import machines
from hostos.errors import UserError
from hostos.steps import JsonEvents, Level, Steps, Talk

Command = TypeVar("Command", bound=Callable[..., Any])
_LEVEL = "hostos.level"


def machine_option(command: Command) -> Command:
    return click.option(
        "-m",
        "--machine",
        default="default",
        show_default=True,
        metavar="NAME",
        help="Which machine.",
        shell_complete=machines,
    )(command)


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for programs.")(command)


def talk_options(command: Command) -> Command:
    """-q and -v; `steps()` goes by them."""

    def remember(level: Level) -> Callable[[click.Context, click.Parameter, bool], None]:
        def callback(ctx: click.Context, _param: click.Parameter, given: bool) -> None:
            if given:
                ctx.meta[_LEVEL] = level

        return callback

    for flags, level, text in (
        (("-v", "--verbose"), "verbose", "Say more: progress, and what is done with what."),
        (("-q", "--quiet"), "quiet", "Say only warnings and errors."),
    ):
        assert level in get_args(Level)
        option = click.option(*flags, is_flag=True, expose_value=False, callback=remember(level), help=text)  # type: ignore[arg-type]
        command = option(command)
    return command


def level() -> Level:
    """How much to say: -q or -v of this command or of `hostos` itself, else the setting talk.level."""
    given = click.get_current_context().meta.get(_LEVEL)
    if given is None:
        from hostos import config

        given = config.get("talk.level")
    return given  # type: ignore[no-any-return]


def steps() -> Steps:
    """What long work tells its steps to: people, on stderr."""
    return Steps(Talk(level=level()))


@contextmanager
def reporting(as_json: bool) -> Iterator[tuple[Steps, JsonEvents | None]]:
    """`steps()`, and with `as_json` one object a line on stdout: the events while it works, at the
    end what came of it (`JsonEvents.result`, by the body) or the error."""
    steps_ = steps()
    if not as_json:
        yield steps_, None
        return
    events = JsonEvents(sys.stdout)
    try:
        yield Steps(steps_.emit, events), events
    except UserError as error:
        events.error(error.message, error.hint, error.status)
        raise
    except KeyboardInterrupt:
        events.error("interrupted", "", 130)
        raise


def print_json(content: dict[str, Any] | list[Any]) -> None:
    click.echo(json.dumps(content, indent=2))


def human_size(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
