"""pacman's database of what is installed, free of when it was installed.

`var/lib/pacman/local/NAME-VERSION/desc`: sections, `%NAME%` and what it says on the lines below. `%INSTALLDATE%` is the
clock's, whatever SOURCE_DATE_EPOCH says (libalpm/add.c).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from hostos.image.entries import Entry

_RECORD = re.compile(rb"var/lib/pacman/local/[^/]+/desc")
_WHEN = re.compile(rb"^(%INSTALLDATE%\n)\d+$", re.M)
_MOST = 1 << 24


def timeless(entries: Iterable[Entry], epoch: int) -> Iterator[Entry]:
    """`entries`, what pacman installed as if at `epoch` (Unix time)."""
    for entry in entries:
        if entry.is_file and 0 < entry.size <= _MOST and _RECORD.fullmatch(entry.path):
            data = _WHEN.sub(b"\\g<1>%d" % epoch, entry.read(entry.size))
            yield replace(entry, size=len(data), segments=((0, len(data)),), open=partial(io.BytesIO, data))
        else:
            yield entry
