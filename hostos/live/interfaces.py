"""Tells when this machine's network interfaces or addresses have changed (Linux; elsewhere libtorrent's own
notice is all there is).

libtorrent stops listening on an interface that loses its link, and overlooks that an address it knows has
come back (libtorrent pull request 7737): a seed whose cable was pulled once would never be reached again. So
it is told.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from typing import Any

_ROUTE, _LINK, _IPV4_ADDRESS, _IPV6_ADDRESS = 0, 0x1, 0x10, 0x100
"""NETLINK_ROUTE and RTMGRP_… of linux/rtnetlink.h."""


class Interfaces:
    """Listens to the kernel from its creation on; of the network namespace of the calling thread."""

    def __init__(self) -> None:
        self._link: socket.socket | None = None
        if sys.platform == "linux":
            self._link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _ROUTE)
            self._link.bind((0, _LINK | _IPV4_ADDRESS | _IPV6_ADDRESS))
            self._link.setblocking(False)

    def changed(self) -> bool:
        """Whether anything did since the last time."""
        found = False
        if self._link is not None:
            with contextlib.suppress(BlockingIOError):
                while True:
                    try:
                        self._link.recv(1 << 16)
                    except OSError as error:
                        if error.errno != errno.ENOBUFS:  # more than were kept: a change as well
                            raise
                    found = True
        return found

    def close(self) -> None:
        if self._link is not None:
            self._link.close()


def listen_again(session: Any) -> None:
    """Have libtorrent listen where it can now; sockets that are as they should be stay."""
    session.reopen_network_sockets(0)
