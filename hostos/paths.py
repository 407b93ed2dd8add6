"""Where hostos keeps things (docs/files.md describes every file).

`HOSTOS_HOME` moves all of it below one directory, for tests and for portable set-ups.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import platformdirs

from hostos.errors import UserError

APP = "hostos"

# macOS allows 104 bytes for a Unix socket path including the final NUL, Linux 108 (unix(7)).
SOCKET_PATH_LIMIT = 103


def _home() -> Path | None:
    home = os.environ.get("HOSTOS_HOME")
    return Path(home).absolute() if home else None


def state_dir() -> Path:
    """Machines live here, in `machines/NAME/`."""
    home = _home()
    return home / "state" if home else Path(platformdirs.user_state_dir(APP))


def data_dir() -> Path:
    """The image and seed store, and installed OS builds."""
    home = _home()
    return home / "data" if home else Path(platformdirs.user_data_dir(APP))


def cache_dir() -> Path:
    """Build caches; anything in here may be deleted at any time."""
    home = _home()
    return home / "cache" if home else Path(platformdirs.user_cache_dir(APP))


def config_dir() -> Path:
    home = _home()
    return home / "config" if home else Path(platformdirs.user_config_dir(APP))


def runtime_dir() -> Path:
    """Sockets. Short on purpose: a path over 103 bytes cannot be bound, so a long `HOSTOS_HOME`
    (or user name) is replaced by a directory in the system's temporary directory that is derived
    from it and private to the user."""
    home = _home()
    path = home / "run" if home else _user_runtime_dir()
    # 40 bytes are left for "/<machine>/<socket>".
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT - 40:
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
        name = f"hostos-{os.getuid()}-{digest}"
        path = Path(tempfile.gettempdir()) / name
        if len(os.fsencode(path)) > SOCKET_PATH_LIMIT - 40:
            # macOS's temporary directory alone takes 48 bytes.
            path = Path("/tmp") / name
    return path


def _user_runtime_dir() -> Path:
    """The user's runtime directory; where nobody made one (no login session, as under `su` or in
    CI), one in the temporary directory that only this user can use."""
    configured = os.environ.get("XDG_RUNTIME_DIR")
    login = Path(f"/run/user/{os.getuid()}")
    if configured:
        return Path(configured) / APP
    if sys.platform == "darwin":
        return Path(platformdirs.user_runtime_dir(APP))
    return login / APP if os.access(login, os.W_OK) else Path(tempfile.gettempdir()) / f"{APP}-{os.getuid()}"


def private_dir(path: Path) -> Path:
    """Create `path` (and its parents) readable by its owner only, and return it.

    Raises `UserError` when it is somebody else's, as it may be in a temporary directory, or cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.stat().st_uid
    except OSError as error:
        raise UserError(
            f"{path} cannot be used: {error.strerror}", "choose another place: HOSTOS_HOME=<directory>"
        ) from None
    if owner != os.getuid():
        raise UserError(
            f"{path} belongs to somebody else (uid {owner})", "choose another place: HOSTOS_HOME=<directory>"
        )
    return path
