"""Names of machines and hosts."""

from __future__ import annotations

import re

from hostos.errors import UserError

# Linux: HOST_NAME_MAX.
HOSTNAME_MAX = 64
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_MACHINE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def check_hostname(name: str) -> str:
    """Return `name` if RFC 1123 and Linux allow it as a host name, else raise UserError."""
    if not name:
        raise UserError("the hostname is empty", "give one like --hostname box1")
    if len(name) > HOSTNAME_MAX:
        raise UserError(f"the hostname is {len(name)} characters long", f"Linux allows {HOSTNAME_MAX}")
    for label in name.split("."):
        if not _LABEL.fullmatch(label):
            raise UserError(
                f"{name!r} is not a hostname",
                "letters, digits and inner hyphens, parts joined by dots (RFC 1123), e.g. box1",
            )
    return name


def check_machine_name(name: str) -> str:
    """Return `name` if it can name a machine (and, by default, its host), else raise UserError."""
    if not _MACHINE.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a machine",
            "use lower-case letters, digits and inner hyphens, at most 63, e.g. box1",
        )
    return name
