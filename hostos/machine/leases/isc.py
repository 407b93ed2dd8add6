r"""ISC dhcpd's lease file (dhcpd.leases(5)): a log, of which the last entry of an address holds.

    lease 192.168.77.23 {
      starts 5 2026/11/20 10:00:00;
      ends 5 2026/11/20 22:00:00;          # or: never; or: epoch 1795212000; # with db-time-format local
      binding state active;
      hardware ethernet 52:54:00:12:34:56;
      uid "\001RT\000\0224V";
      client-hostname "box";
    }

Times are UTC. Only leases in state `active` are held by anybody. Entries are appended, and now and
then the file is replaced by one without the outdated ones. Other declarations (host, failover,
server-duid, …) may stand between, with blocks of their own.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterator

from hostos.machine.leases.model import Lease, mac_of_client_id, parse_address, parse_mac

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|#[^\n]*|[{};]|[^\s{};"#]+', re.S)
_ESCAPE = re.compile(r"\\([0-7]{1,3}|x[0-9A-Fa-f]{1,2}|.)", re.S)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b"}


def parse(text: str) -> list[Lease]:
    """The leases in use, the newest first."""
    held: dict[str, Lease] = {}
    for address, statements in _entries(text):
        # The last one says what holds, also that it was given back.
        held.pop(address, None)
        lease = _lease(address, statements)
        if lease is not None:
            held[address] = lease
    return list(reversed(held.values()))


def _entries(text: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Each complete `lease ADDRESS { … }` with its statements, as words."""
    depth = 0
    words: list[str] = []
    lease: str | None = None
    statements: list[list[str]] = []
    for token in _TOKEN.findall(text):
        if token.startswith("#"):
            continue
        if token == "{":
            if depth == 0:
                lease = words[1] if len(words) == 2 and words[0] == "lease" else None
                statements = []
            depth += 1
            words = []
        elif token == "}":
            depth = max(0, depth - 1)
            address = parse_address(lease) if lease and depth == 0 else None
            if address is not None:
                yield address, statements
            if depth == 0:
                lease = None
            words = []
        elif token == ";":
            if depth == 1:
                statements.append(words)
            words = []
        else:
            words.append(token)


def _lease(address: str, statements: list[list[str]]) -> Lease | None:
    mac, hostname, expires, identifier = None, "", None, b""
    active = True
    for words in statements:
        match words:
            case ["binding", "state", state]:
                active = state == "active"
            case ["hardware", "ethernet", hardware]:
                mac = parse_mac(hardware)
            case ["client-hostname", name]:
                hostname = _string(name)
            case ["uid", value] if value.startswith('"'):
                identifier = _string(value).encode("latin-1", "replace")
            case ["uid", value]:
                identifier = _hexadecimal(value)
            case ["ends", *when]:
                try:
                    expires = _time(when)
                except ValueError:
                    return None
    if not active:
        return None
    return Lease(address, mac or mac_of_client_id(identifier), hostname, expires)


def _time(words: list[str]) -> float | None:
    """Raises ValueError."""
    match words:
        case ["never"]:
            return None
        case ["epoch", seconds]:
            return float(int(seconds))
        case [_, date, time]:
            year, month, day = (int(part) for part in date.split("/"))
            hour, minute, second = (int(part) for part in time.split(":"))
            return float(calendar.timegm((year, month, day, hour, minute, second)))
    raise ValueError(words)


def _string(token: str) -> str:
    def plain(match: re.Match[str]) -> str:
        what = match[1]
        if what[0] in "01234567":
            return chr(int(what, 8) & 0xFF)
        return chr(int(what[1:], 16)) if what[0] == "x" and len(what) > 1 else _LETTERS.get(what, what)

    return _ESCAPE.sub(plain, token[1:-1] if token.startswith('"') else token)


def _hexadecimal(text: str) -> bytes:
    """`01:52:54:…`, as `lease-id-format hex` writes it."""
    try:
        return bytes.fromhex(text.replace(":", ""))
    except ValueError:
        return b""
