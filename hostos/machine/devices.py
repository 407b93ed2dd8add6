"""What the guest is to mount: the lines of `/etc/hostos/instance/devices` (overlay/usr/lib/hostos/devices)."""

from __future__ import annotations

from hostos.machine.disk import SERIAL, Disk
from hostos.machine.share import Share, tag


def lines(disk: Disk | None, shares: tuple[Share, ...]) -> str:
    """One device a line, words separated by one space; a path is the rest of its line."""
    found = []
    if disk is not None:
        found.append(f"disk {SERIAL} {'format' if disk.format else 'keep'}")
    for number, share in enumerate(shares):
        found.append(f"9p {tag(number)} {'ro' if share.read_only else 'rw'} {share.guest}")
    return "".join(f"{line}\n" for line in found)
