"""Which address a machine on a bridge has: what DHCP servers wrote down, and what the guest says."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from hostos.machine.leases import ABSENT, Found, Lease, LeaseSource, find
from hostos.machine.leases.model import parse_address

# A lease that was there before the start is likely to be given again; after this many seconds it is tried.
OLD_LEASE_SECONDS = 8.0
_EVERY = 0.1
# A server writes its lease down a moment after it has given it, and a file may be seen half written: the guest's
# word is believed after this many seconds and looks without a lease (a loaded host may look once in a second).
_GRACE = 0.5
_LOOKS = 5
_SAID = re.compile(rb"^network(?: ([0-9.]+))?$", re.M)


@dataclass
class Locator:
    """Looks for the guest's address, again and again.

    `mac`, `hostname`: who is looked for. `agent`: the guest's port, on which it says `network ADDRESS`
    once it has one (docs/guest.md); that is believed where no file tells.
    """

    sources: Sequence[LeaseSource]
    mac: str
    hostname: str
    agent: socket.socket | None = None
    announced: bool = False
    _before: Lease | None = None
    _began: float = field(default_factory=time.monotonic)
    _said: str | None = None
    _heard_at: float = 0.0
    _heard: bytes = b""
    _looked: float = 0.0
    _looks: int = 0
    _found: Found | None = None

    def __post_init__(self) -> None:
        found = find(self.sources, self.mac, self.hostname, time.time())
        self._before = found.lease if found else None

    def look(self) -> Found | None:
        """The guest's address as far as it is known now."""
        now = time.monotonic()
        self._listen(now)
        if now - self._looked >= _EVERY or self._heard_at == now:
            self._looked = now
            self._looks += 1
            self._found = find(self.sources, self.mac, self.hostname, time.time())
        found = self._found
        if found is not None and self._said and found.lease.address != self._said:
            # The guest knows best; the file has an older lease, or another server's.
            found = None
        if found is None and self._said:
            about_to_be_written = any(source.fault != ABSENT for source in self.sources)
            if about_to_be_written and (now - self._heard_at < _GRACE or self._looks < _LOOKS):
                return None
            return Found(Lease(self._said, self.mac, self.hostname), "said by the guest")
        if found is not None and found.lease == self._before and not self._trusted(now):
            return None
        return found

    def _trusted(self, now: float) -> bool:
        """Whether a lease that is as it was before the start may be this start's."""
        return self.announced or now - self._began > OLD_LEASE_SECONDS

    def _listen(self, now: float) -> None:
        if self.agent is None:
            return
        with contextlib.suppress(BlockingIOError):
            try:
                data = self.agent.recv(4096)
            except BlockingIOError:
                raise
            except OSError:
                data = b""
            if not data:
                self.agent = None
            self._heard = (self._heard + data)[-4096:]
        complete, newline, rest = self._heard.rpartition(b"\n")
        self._heard = rest
        complete += newline
        for said in _SAID.finditer(complete):
            self.announced = True
            address = parse_address((said[1] or b"").decode())
            if address and address != self._said:
                self._said, self._heard_at, self._looks = address, now, 0

    def why_not(self) -> str:
        """What each source says, for people."""
        if not self.sources:
            return "no lease file is watched"
        seen = []
        for source in self.sources:
            source.leases()
            seen.append(f"{source.name}: {source.fault or 'none of this machine'}")
        # Most default places do not exist on any one host.
        there = [each for each in seen if not each.endswith(f": {ABSENT}")]
        return "; ".join(there or seen)
