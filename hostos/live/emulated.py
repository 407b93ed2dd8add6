"""Hashing in an emulated machine.

OpenSSL goes by what the processor says it can. QEMU's emulation says AVX2 and does it a helper call at a time:
SHA-256 of 64 KiB takes 9.9 ms with OpenSSL's choice and 1.2 ms with its plain code, and every piece of
an image is hashed twice (by libtorrent, and when it is read). OPENSSL_ia32cap(3).

To be called before anything loads libcrypto, so before `hashlib`.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "OPENSSL_ia32cap"
# Without SSSE3 and AVX; then AVX2, BMI1, BMI2 and SHA. What AES uses stays: it is one helper call a round.
PLAIN = "~0x1000020000000000:~0x20000128"
_EMULATED = b"QEMU TCG CPU"
"""The model name that QEMU's emulation gives its `max` processor."""


def prefer_plain_code(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Have this process and its children hash with plain code if the processor is emulated; whether it is.
    What the user has set stays."""
    try:
        with cpuinfo.open("rb") as file:
            emulated = _EMULATED in file.read(1024)
    except OSError:
        return False
    if emulated:
        os.environ.setdefault(VARIABLE, PLAIN)
    return emulated
