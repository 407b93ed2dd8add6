"""TCP_NODELAY for libtorrent's sockets.

libtorrent leaves Nagle's algorithm on and has no setting for it; with delayed acknowledgements that
costs about 44 ms for every piece a reader waits for, even without any latency on the link. So the
option is set from outside, on every TCP socket this process has open.

On Linux an accepted socket takes the option over from the listening one, so what listens needs one
`scan()`; outgoing connections need a scan each: call it when one is made, or let `start()` do it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading


class NoDelay:
    """Finds new TCP sockets among the open files of this process and sets the option on them."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def scan(self) -> int:
        """Look once; returns how many sockets were new. Cheap: one fstat(2) per open file."""
        new = 0
        with self._lock:
            seen: dict[int, int] = {}
            with os.scandir("/dev/fd") as entries:
                descriptors = [int(entry.name) for entry in entries]
            for descriptor in descriptors:
                try:
                    status = os.fstat(descriptor)
                except OSError:
                    continue  # closed meanwhile, as the directory's own descriptor is
                if not stat.S_ISSOCK(status.st_mode):
                    continue
                seen[descriptor] = status.st_ino
                if self._known.get(descriptor) != status.st_ino:
                    new += _set(descriptor)
            self._known = seen
        return new

    def start(self, period: float = 0.05) -> None:
        """Scan every `period` seconds in a daemon thread until `stop()`."""
        threading.Thread(target=self._run, args=(period,), name="nodelay", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self, period: float) -> None:
        while not self._stopped.wait(period):
            self.scan()


def _set(descriptor: int) -> bool:
    """Set the option if `descriptor` is a TCP socket; works on a copy, so it is never closed."""
    with contextlib.suppress(OSError):
        with socket.socket(fileno=os.dup(descriptor)) as copy:
            inet = copy.family in (socket.AF_INET, socket.AF_INET6)
            if inet and copy.type == socket.SOCK_STREAM:
                copy.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return True
    return False
