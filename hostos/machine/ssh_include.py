"""Our hosts in the user's own ~/.ssh/config, so that every SSH program knows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hostos.errors import failure
from hostos.machine.files import write_atomic
from hostos.machine.ssh import write_all_machines_config


def include_line() -> str:
    """What ~/.ssh/config needs; the file it names is there afterwards. Raises OSError, UserError."""
    path = str(write_all_machines_config()).replace("\\", "\\\\").replace('"', '\\"')
    return f'Include "{path}"'


def user_config() -> Path:
    return Path.home() / ".ssh" / "config"


def install(config: Path) -> bool:
    """Put the Include above everything else in `config` (below a Host line it would hold for that
    host only); whether anything changed. Raises UserError (status 1)."""
    line = include_line()
    return _rewrite(config, lambda lines: lines if line in lines else [line, *lines])


def remove(config: Path) -> bool:
    """Take it out again; whether it was there. Raises UserError (status 1)."""
    line = include_line()
    return _rewrite(config, lambda lines: [each for each in lines if each != line])


def _rewrite(config: Path, change: Callable[[list[str]], list[str]]) -> bool:
    try:
        # A link into somebody's dotfiles stays one.
        config = config.resolve()
        before = config.read_text() if config.exists() else ""
        mode = config.stat().st_mode & 0o777 if config.exists() else 0o600
        after = "".join(f"{line}\n" for line in change(before.splitlines()))
        if after == before:
            return False
        config.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomic(config, after.encode(), mode)
    except (OSError, UnicodeDecodeError) as error:
        raise failure(f"{config} cannot be changed: {error}", f"write it there yourself: {include_line()}") from error
    return True
