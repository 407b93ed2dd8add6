"""Translates the addresses of containers to the machine's own, as `nft` would be told to.

The guest has no `nft`; four messages over netlink are all it takes. linux/netfilter/nf_tables.h.

    table ip hostos {
        chain outward { type nat hook postrouting priority 100; ip saddr 10.88.0.0/16 masquerade }
    }
"""

from __future__ import annotations

import os
import socket
import struct

TABLE, CHAIN = b"hostos", b"outward"
PREFIX = bytes((10, 88))
"""Of the containers' addresses, as it is compared."""

_NETLINK_NETFILTER = 12
_REQUEST, _ACK, _CREATE, _APPEND, _EXCL = 1, 4, 0x400, 0x800, 0x200
_BATCH_BEGIN, _BATCH_END, _NFTABLES = 16, 17, 10
_NEW_TABLE, _DELETE_TABLE, _NEW_CHAIN, _NEW_RULE = 0, 2, 3, 6
_NESTED = 0x8000
_POSTROUTING, _SOURCE_NAT = 4, 100
_REGISTER, _VERDICT, _NETWORK_HEADER, _EQUAL = 1, 0, 1, 0
_SOURCE_ADDRESS = 12
"""Its place in an IPv4 header."""


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def _nest(kind: int, *parts: bytes) -> bytes:
    return _attribute(kind | _NESTED, b"".join(parts))


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack(">I", value))


def _expression(name: bytes, *parts: bytes) -> bytes:
    return _nest(1, _attribute(1, name + b"\0"), _nest(2, *parts))


def _message(kind: int, flags: int, sequence: int, body: bytes, family: int, resource: int = 0) -> bytes:
    content = struct.pack(">BBH", family, 0, resource) + body
    return struct.pack("=IHHII", 16 + len(content), kind, flags, sequence, 0) + content


def messages() -> list[bytes]:
    """One transaction: the table as it should be, whatever was there."""
    name = _attribute(1, TABLE + b"\0")
    hook = _nest(4, _number(1, _POSTROUTING), _number(2, _SOURCE_NAT))
    chain = name + _attribute(3, CHAIN + b"\0") + hook + _attribute(7, b"nat\0")
    rule = name + _attribute(2, CHAIN + b"\0") + _nest(
        4,
        _expression(
            b"payload",
            _number(1, _REGISTER), _number(2, _NETWORK_HEADER), _number(3, _SOURCE_ADDRESS), _number(4, len(PREFIX)),
        ),
        _expression(b"cmp", _number(1, _REGISTER), _number(2, _EQUAL), _nest(3, _attribute(1, PREFIX))),
        _expression(b"masq"),
    )  # fmt: skip
    ip, own = socket.AF_INET, _NFTABLES << 8
    return [
        _message(_BATCH_BEGIN, _REQUEST, 0, b"", 0, _NFTABLES),
        # Made if it isn't there, so that it can be removed with what it holds.
        _message(own | _NEW_TABLE, _REQUEST | _CREATE | _ACK, 1, name, ip),
        _message(own | _DELETE_TABLE, _REQUEST | _ACK, 2, name, ip),
        _message(own | _NEW_TABLE, _REQUEST | _CREATE | _ACK, 3, name, ip),
        _message(own | _NEW_CHAIN, _REQUEST | _CREATE | _ACK, 4, chain, ip),
        _message(own | _NEW_RULE, _REQUEST | _CREATE | _APPEND | _ACK, 5, rule, ip),
        _message(_BATCH_END, _REQUEST, 6, b"", 0, _NFTABLES),
    ]


def masquerade() -> None:
    """Have packets of containers leave with the machine's address. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as link:
        link.bind((0, 0))
        link.settimeout(5)
        link.send(b"".join(messages()))
        answered = 0
        while answered < 5:
            data = link.recv(65536)
            while len(data) >= 20:
                length, kind, _, sequence, _, code = struct.unpack_from("=IHHIIi", data)
                if kind == 2:  # NLMSG_ERROR, 0 is success
                    if code:
                        raise OSError(-code, f"message {sequence}: {os.strerror(-code)}")
                    answered += 1
                data = data[(length + 3) & ~3 :]
