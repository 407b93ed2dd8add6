"""Translates the addresses of containers to the machine's own, as `nft` would be told to.

The guest has no `nft`; four messages over netlink are all it takes. linux/netfilter/nf_tables.h.

    table ip hostos {
        chain outward { type nat hook postrouting priority 100; ip saddr 10.88.0.0/16 masquerade }
    }
"""

from __future__ import annotations

import socket
import struct

from hostos.live.netlink import ACK, APPEND, CREATE, REQUEST, attribute, message, nest, open_socket, request

PROTOCOL = 12
"""NETLINK_NETFILTER"""
TABLE, CHAIN = b"hostos", b"outward"
PREFIX = bytes((10, 88))
"""Of the containers' addresses, as it is compared."""

_BATCH_BEGIN, _BATCH_END, _NFTABLES = 16, 17, 10
_NEW_TABLE, _DELETE_TABLE, _NEW_CHAIN, _NEW_RULE = 0, 2, 3, 6
_POSTROUTING, _SOURCE_NAT = 4, 100
_REGISTER, _VERDICT, _NETWORK_HEADER, _EQUAL = 1, 0, 1, 0
_SOURCE_ADDRESS = 12
"""Its place in an IPv4 header."""


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def _expression(name: bytes, *parts: bytes) -> bytes:
    return nest(1, attribute(1, name + b"\0"), nest(2, *parts))


def _message(kind: int, flags: int, sequence: int, body: bytes, family: int, resource: int = 0) -> bytes:
    return message(kind, flags, sequence, struct.pack(">BBH", family, 0, resource) + body)


def messages() -> list[bytes]:
    """One transaction: the table as it should be, whatever was there."""
    name = attribute(1, TABLE + b"\0")
    hook = nest(4, _number(1, _POSTROUTING), _number(2, _SOURCE_NAT))
    chain = name + attribute(3, CHAIN + b"\0") + hook + attribute(7, b"nat\0")
    rule = name + attribute(2, CHAIN + b"\0") + nest(
        4,
        _expression(
            b"payload",
            _number(1, _REGISTER), _number(2, _NETWORK_HEADER), _number(3, _SOURCE_ADDRESS), _number(4, len(PREFIX)),
        ),
        _expression(b"cmp", _number(1, _REGISTER), _number(2, _EQUAL), nest(3, attribute(1, PREFIX))),
        _expression(b"masq"),
    )  # fmt: skip
    ip, own = socket.AF_INET, _NFTABLES << 8
    return [
        _message(_BATCH_BEGIN, REQUEST, 0, b"", 0, _NFTABLES),
        # Made if it isn't there, so that it can be removed with what it holds.
        _message(own | _NEW_TABLE, REQUEST | CREATE | ACK, 1, name, ip),
        _message(own | _DELETE_TABLE, REQUEST | ACK, 2, name, ip),
        _message(own | _NEW_TABLE, REQUEST | CREATE | ACK, 3, name, ip),
        _message(own | _NEW_CHAIN, REQUEST | CREATE | ACK, 4, chain, ip),
        _message(own | _NEW_RULE, REQUEST | CREATE | APPEND | ACK, 5, rule, ip),
        _message(_BATCH_END, REQUEST, 6, b"", 0, _NFTABLES),
    ]


def masquerade() -> None:
    """Have packets of containers leave with the machine's address. Raises OSError."""
    with open_socket(PROTOCOL) as link:
        request(link, messages())
