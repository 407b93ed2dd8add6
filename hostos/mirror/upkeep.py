"""What the cache does by itself: expiry, prefetch of what is used when an index changes, contribution.

All of it is done one file after another, behind the download limit, and stops when the disk is full.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

from hostos.mirror.catalogue import Catalogue, Known
from hostos.mirror.contents import Contents, Wanted
from hostos.mirror.errors import RefusedError
from hostos.mirror.settings import Settings
from hostos.mirror.store import RESERVE, Evicted, Store

DAY_S = 86400.0
EVERY_S = 3600.0
USED_WITHIN_S = 30 * DAY_S
"""A package used within this time is prefetched in its new version."""
CONTRIBUTED_SIZE = 64 << 20
"""Larger files (bytes) are not contributed."""
FORGET_S = 60 * DAY_S
"""What no index has named for so long is forgotten."""


def expire(store: Store, keep_days: int) -> Evicted:
    """Remove what was not used for so many days (0: keep for ever) and what was begun and not asked for
    since; then what is over the size limit."""
    gone = store.expire(time.time() - keep_days * DAY_S) if keep_days else Evicted()
    over = store.ledger.total()[1] - store.limit if store.limit else 0
    more = store.evict(over) if over > 0 else Evicted()
    return Evicted(gone.files + more.files, gone.size + more.size)


@dataclass
class Upkeep:
    """`wanted`: how to get a file that the catalogue knows, None if its archive is no longer configured."""

    settings: Settings
    catalogue: Catalogue
    contents: Contents
    wanted: Callable[[Known], Wanted | None]
    log: Callable[[str], None]

    async def run(self) -> None:
        """Until cancelled."""
        contributed = 0.0
        while True:
            gone = expire(self.contents.store, self.settings.keep_days)
            if gone.files:
                self.log(f"expired: {gone.files} files, {gone.size} bytes")
            self._remove_old_partials()
            self.catalogue.forget(time.time() - FORGET_S)
            if self.settings.contribute and time.time() - contributed > DAY_S and self.catalogue.count():
                contributed = time.time()
                await self.contribute(self.settings.contribute)
            # Until the first index has been read there is nothing to contribute.
            await asyncio.sleep(EVERY_S if contributed or not self.settings.contribute else 2.0)

    def _remove_old_partials(self) -> None:
        active = self.contents.active
        old = time.time() - DAY_S * max(1, self.settings.keep_days)
        partials = self.contents.store.partials

        def keep(sha256: str) -> bool:
            path = partials / sha256
            return sha256 in active or (path.exists() and path.stat().st_mtime > old)

        self.contents.store.remove_partials(keep)

    async def contribute(self, count: int) -> int:
        """Fetch, verify and offer `count` files that nobody here asked for; returns how many it were."""
        done = 0
        for known in self.catalogue.random(4 * count, CONTRIBUTED_SIZE):
            if done == count:
                break
            if self.contents.held(known) is None and await self._fetch(known, "contributed"):
                done += 1
        return done

    async def prefetch(self, location: str) -> int:
        """The index at `location` has changed: fetch the new versions of what is used."""
        names = {
            name
            for sha256 in self.contents.ledger.wanted_since(time.time() - USED_WITHIN_S)
            if (name := self.catalogue.name_of(sha256)) is not None
        }
        done = 0
        for known in self.catalogue.newest_of(location, sorted(names)):
            if self.contents.held(known) is None and await self._fetch(known, "prefetched"):
                done += 1
        return done

    async def _fetch(self, known: Known, how: str) -> bool:
        """False if it can't be had. Never evicts what somebody asked for."""
        store = self.contents.store
        held = store.ledger.total()[1]
        if store.limit and held + known.size > store.limit:
            return False
        if shutil.disk_usage(store.root).free < known.size + 2 * RESERVE:
            return False
        wanted = self.wanted(known)
        if wanted is None:
            return False
        try:
            await self.contents.obtain(wanted)
        except RefusedError as error:
            self.log(f"not {how}: {error.reason}")
            return False
        self.log(f"{how}: {known.location}")
        return True
