"""QEMU's monitor for saving and loading machines, without an event loop.

Importing asyncio and qemu.qmp (see monitor) takes 0.05 s, which a warm start has no guest to boot
beside of: a twentieth of it. So this speaks the protocol itself: one JSON object a line (QEMU,
docs/interop/qmp-spec).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

_POLL = 0.002
# What query-migrate says of one that will not go on.
_ENDED = ("completed", "failed", "cancelled")


class QmpError(Exception):
    """QEMU did not do what was asked, or is gone; the message says why."""


def dial(path: Path, alive: Callable[[], bool], give_up: float) -> socket.socket:
    """Connect to QEMU's socket `path` as soon as it is there.

    `give_up`: on the monotonic clock. Raises QmpError when QEMU ends or time is up before.
    """
    while True:
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.connect(os.fspath(path))
        except OSError as error:
            connected.close()
            if not alive():
                raise QmpError("QEMU ended") from error
            if time.monotonic() > give_up:
                raise QmpError(f"{path}: {error.strerror}") from error
            time.sleep(_POLL)
        else:
            return connected


class Qmp:
    """A connection to the monitor; QEMU serves one client at a time. A context manager."""

    def __init__(self, path: Path, alive: Callable[[], bool], give_up: float) -> None:
        """Connect, waiting until `give_up` (monotonic) for QEMU to be there; raises QmpError."""
        self._alive = alive
        self._rest = b""
        self._socket = dial(path, alive, give_up)
        try:
            self._receive("QMP", give_up)
            self.execute("qmp_capabilities", give_up=give_up)
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, *, give_up: float, fd: int | None = None, **arguments: object) -> Any:
        """Run a QMP command (`_` in argument names stands for `-`) and return its answer.

        `fd` goes with it. Raises QmpError.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps({"execute": command, "arguments": named}).encode() + b"\n"
        try:
            self._socket.settimeout(max(give_up - time.monotonic(), 0.01))
            if fd is None:
                self._socket.sendall(line)
            else:
                socket.send_fds(self._socket, [line], [fd])
        except OSError as error:
            raise QmpError(f"{command}: {error}") from error
        answer = self._receive("return", give_up)
        return answer["return"]

    def save(self, descriptor: int, give_up: float) -> None:
        """Write the halted machine to an open file; raises QmpError."""
        self.execute("getfd", fdname="state", fd=descriptor, give_up=give_up)
        self.execute("migrate", uri="fd:state", give_up=give_up)
        self.finish(give_up)

    def load(self, descriptor: int, give_up: float) -> None:
        """Read a machine that was saved into this one, which waits for it; raises QmpError."""
        self.execute("getfd", fdname="state", fd=descriptor, give_up=give_up)
        self.execute("migrate-incoming", uri="fd:state", give_up=give_up)
        self.finish(give_up)

    def leave_memory_out(self, give_up: float, *, leave: bool = True) -> None:
        """Memory in a shared file is neither saved nor loaded: the file is it. Raises QmpError."""
        capability = {"capability": "x-ignore-shared", "state": leave}
        self.execute("migrate-set-capabilities", capabilities=[capability], give_up=give_up)

    def finish(self, give_up: float) -> None:
        """Wait for the end of a migration; raises QmpError unless it ended well."""
        while True:
            status = self.execute("query-migrate", give_up=give_up)
            if status.get("status") in _ENDED:
                break
            if time.monotonic() > give_up:
                raise QmpError(f"saving or loading takes too long ({status.get('status', 'not begun')})")
            time.sleep(_POLL)
        if status["status"] != "completed":
            raise QmpError(f"saving or loading {status['status']}: {status.get('error-desc', 'no reason given')}")

    def _receive(self, key: str, give_up: float) -> dict[str, Any]:
        while True:
            while b"\n" not in self._rest:
                try:
                    self._socket.settimeout(min(max(give_up - time.monotonic(), 0.01), 0.25))
                    data = self._socket.recv(1 << 16)
                except TimeoutError:
                    if not self._alive():
                        raise QmpError("QEMU ended") from None
                    if time.monotonic() > give_up:
                        raise QmpError("QEMU's monitor does not answer") from None
                    continue
                except OSError as error:
                    raise QmpError(f"QEMU's monitor: {error}") from error
                if not data:
                    raise QmpError("QEMU ended")
                self._rest += data
            line, self._rest = self._rest.split(b"\n", 1)
            try:
                message = json.loads(line)
            except ValueError as error:
                raise QmpError("QEMU's monitor does not speak QMP") from error
            if "error" in message:
                raise QmpError(str(message["error"].get("desc", message["error"])))
            # Events come in between.
            if key in message:
                return dict(message)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
