"""The kernel command line: the contract with the guest (docs/machine.md, "Kernel command line").

The kernel cuts a longer one off without a word, and everyone in the guest can read it, so keys
travel here only while they fit; the per-instance archive always carries all of them.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

from hostos.errors import UserError

# COMMAND_LINE_SIZE of x86 and arm64, with the final NUL.
COMMAND_LINE_SIZE = 2048
# What an emulated kernel is told besides. With address space randomisation an emulator translates every shared
# library anew for every process: 7 % of the time to SSH. `lpj` spares each further CPU the measuring of its delay
# loop (another 7 %): emulated devices need no exact delays, this stands for 2.5 GHz at our kernel's 100 Hz. On
# arm64 there is nothing to measure: delays are counted in ticks of the timer, whose frequency is known.
EMULATED = {"x86_64": "norandmaps lpj=25000000", "aarch64": "norandmaps"}


def encode_key(line: str) -> str:
    """An authorized_keys line as `hostos.ssh_key` carries it: base64url without padding."""
    return base64.urlsafe_b64encode(line.encode()).decode().rstrip("=")


def compose(base: str, hostname: str, key_lines: Sequence[str], extra: str = "") -> str:
    """`base` (from the OS manifest) with hostname, `extra` and as many keys as fit, in order.

    Raises UserError if it is too long without any key.
    """
    parts = [part for part in (base, f"hostos.hostname={hostname}", extra) if part]
    line = " ".join(parts)
    if len(line.encode()) >= COMMAND_LINE_SIZE:
        raise UserError(
            f"the kernel command line has {len(line.encode())} bytes",
            f"the kernel reads {COMMAND_LINE_SIZE - 1}: shorten it",
        )
    for key in key_lines:
        longer = f"{line} hostos.ssh_key={encode_key(key)}"
        if len(longer.encode()) < COMMAND_LINE_SIZE:
            line = longer
    return line
