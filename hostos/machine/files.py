"""Small files of an instance: written whole or not at all, read with a clear fault."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = 1


class Unreadable(Exception):  # noqa: N818
    """A file is there but does not hold what it should. The message names it."""


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data`; a process killed in between leaves the old content.

    Raises OSError (read-only or full file system).
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with the schema number of this version."""
    text = json.dumps({"schema": SCHEMA, **content}, indent=2, sort_keys=True)
    write_atomic(path, text.encode() + b"\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, None if there is no such file; raises Unreadable."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise Unreadable(f"{path} does not hold a JSON object")
    if content.get("schema") != SCHEMA:
        raise Unreadable(f"{path} has schema {content.get('schema')!r}; this hostos knows {SCHEMA}")
    return content
