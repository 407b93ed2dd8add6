"""Kconfig files: parse what `make olddefconfig` wrote, and check that nothing asked for was lost.

The format is that of the kernel's scripts/kconfig/confdata.c, which Buildroot shares.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from hostos.build.profile import Option, Value
from hostos.errors import UserError

_SET = re.compile(r"^(CONFIG_|BR2_)?([A-Za-z0-9_]+)=(.*)$")
_UNSET = re.compile(r"^# (CONFIG_|BR2_)?([A-Za-z0-9_]+) is not set$")
_SHOWN = 12


def parse_config(text: str) -> dict[str, Value]:
    """A .config as symbol -> value (prefix removed): `y` is True, `n` and "is not set" False,
    numbers int, `m` the text "m", quoted values text with \\\" and \\\\ undone."""
    found: dict[str, Value] = {}
    for line in text.splitlines():
        if match := _UNSET.match(line):
            found[match[2]] = False
        elif match := _SET.match(line):
            found[match[2]] = _value(match[3])
    return found


def _value(raw: str) -> Value:
    if raw in ("y", "n"):
        return raw == "y"
    if len(raw) >= 2 and raw[0] == raw[-1] == '"':
        return re.sub(r"\\(.)", r"\1", raw[1:-1])
    try:
        return int(raw, 0)
    except ValueError:
        return raw


def format_option(option: Option, prefix: str) -> str:
    """One line of a .config. Raises `UserError` for a text Kconfig cannot hold."""
    if option.value is False:
        return f"# {prefix}{option.symbol} is not set"
    if option.value is True:
        return f"{prefix}{option.symbol}=y"
    if isinstance(option.value, int):
        return f"{prefix}{option.symbol}={option.value}"
    if "\n" in option.value:
        raise UserError(f"{option.file}: {option.symbol} may not contain a line break")
    escaped = option.value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{prefix}{option.symbol}="{escaped}"'


def verify(wanted: Iterable[Option], got: Mapping[str, Value], tool: str = "Kconfig") -> None:
    """Raise `UserError` unless every wanted option has its value in `got`.

    An option that is wanted off counts as satisfied when the symbol does not appear at all: that is
    how Kconfig writes a symbol whose dependencies are off.
    """
    lost = []
    for option in wanted:
        actual = got.get(option.symbol)
        if actual == option.value and type(actual) is type(option.value):
            continue
        if option.value is False and actual is None:
            continue
        shown = "absent (no such symbol, or something it depends on is off)" if actual is None else repr(actual)
        lost.append(
            f"{option.symbol}: wanted {option.value!r}, got {shown}; asked for by {option.feature} ({option.file})"
        )
    if lost:
        more = f"\n    … and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise UserError(
            f"{tool} did not keep {len(lost)} requested option(s):\n    " + "\n    ".join(lost[:_SHOWN]) + more,
            "correct the feature file: the symbol may have been renamed or needs another one first",
        )
