"""The one line by which a package manager uses the cache: put in, and taken back exactly."""

from __future__ import annotations

import os
from pathlib import Path

from hostos.errors import UserError, failure
from hostos.machine.files import write_atomic

APT_FILE = "etc/apt/apt.conf.d/30hostos-mirror"
PACMAN_FILE = "etc/pacman.d/mirrorlist"
KINDS = ("apt", "pacman")


def line(kind: str, url: str) -> str:
    """What the client's configuration has to say. apt sends https through an http proxy as well (apt.conf,
    Acquire::https::Proxy), which would gain nothing: those stay direct."""
    if kind == "apt":
        return f'Acquire::http::Proxy "{url}"; Acquire::https::Proxy "DIRECT"; // by hostos mirror enable apt'
    return f"Server = {url}/pacman/$repo/$arch"


def enable(kind: str, url: str, root: Path = Path("/")) -> tuple[Path, bool]:
    """Write the line; returns the file, and whether it had to be changed. Raises UserError."""
    wanted = line(kind, url).encode() + b"\n"
    if kind == "apt":
        path = root / APT_FILE
        if not path.parent.is_dir():
            raise UserError(f"there is no apt here ({path.parent})", "--root DIR names another system's root directory")
        if _content(path) == wanted:
            return path, False
        _write(path, wanted, 0o644)
        return path, True
    path = root / PACMAN_FILE
    before = _content(path)
    if before is None:
        raise UserError(f"there is no pacman here ({path})", "--root DIR names another system's root directory")
    if wanted in before.splitlines(keepends=True):
        return path, False
    # First, so that pacman asks it first; and falls back to the others by itself.
    _write(path, wanted + before, path.stat().st_mode & 0o777)
    return path, True


def disable(kind: str, root: Path = Path("/")) -> tuple[Path, bool]:
    """Take the line out again; returns the file, and whether it was in. Raises UserError."""
    if kind == "apt":
        path = root / APT_FILE
        content = _content(path)
        if content is None:
            return path, False
        if content.count(b"\n") != 1 or not content.endswith(b"// by hostos mirror enable apt\n"):
            raise UserError(f"{path} has been edited: it is not removed", f"look at it, then: rm {path}")
        try:
            path.unlink()
        except OSError as error:
            raise _denied(path, error) from None
        return path, True
    path = root / PACMAN_FILE
    before = _content(path) or b""
    lines = before.splitlines(keepends=True)
    ours = [number for number, text in enumerate(lines) if _is_ours(text)]
    if not ours:
        return path, False
    kept = b"".join(text for number, text in enumerate(lines) if number not in ours)
    _write(path, kept, path.stat().st_mode & 0o777)
    return path, True


def _is_ours(text: bytes) -> bool:
    return text.startswith(b"Server = http://") and text.endswith(b"/pacman/$repo/$arch\n") and b"/pacman/$repo" in text


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _denied(path, error) from None


def _write(path: Path, data: bytes, mode: int) -> None:
    try:
        write_atomic(path, data, mode)
    except OSError as error:
        raise _denied(path, error) from None


def _denied(path: Path, error: OSError) -> UserError:
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        return UserError(f"{path} is root's", "run it as root: sudo -E hostos mirror enable …")
    return failure(f"{path}: {error.strerror}")
