"""Changes to `config.toml` that keep its comments, order and layout (tomlkit)."""

from __future__ import annotations

from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from hostos import config
from hostos.errors import UserError, failure
from hostos.paths import private_dir


def set_value(name: str, value: Any) -> None:
    """Write one setting. Raises UserError."""
    document = _read()
    table, _, key = name.partition(".")
    if table not in document:
        document[table] = tomlkit.table()
    document[table][key] = value
    _write(document)


def unset(name: str) -> bool:
    """Remove one setting; whether it was there. Raises UserError."""
    document = _read()
    table, _, key = name.partition(".")
    values = document.get(table)
    if values is None or key not in values:
        return False
    del values[key]
    if not values:
        del document[table]
    _write(document)
    return True


def _read() -> tomlkit.TOMLDocument:
    try:
        return tomlkit.parse(config.path().read_text())
    except FileNotFoundError:
        return tomlkit.document()
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        raise UserError(f"{config.path()} cannot be read: {error}", "mend it: hostos config edit") from None


def _write(document: tomlkit.TOMLDocument) -> None:
    from hostos.machine.files import write_atomic

    path = config.path()
    try:
        private_dir(path.parent)
        write_atomic(path.resolve(), tomlkit.dumps(document).encode())
    except OSError as error:
        raise failure(f"{path} cannot be written: {error.strerror}", "check its owner and mode") from None
