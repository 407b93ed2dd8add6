"""Interfaces, addresses and routes of one network namespace. rtnetlink(7), linux/rtnetlink.h, linux/if_link.h.

The messages of one `Batch` are sent together, in their order.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Final

from hostos.live.netlink import ACK, CREATE, EXCL, REQUEST, attribute, attributes, dump, message, nest, request

PROTOCOL: Final = 0
"""NETLINK_ROUTE"""
LOOPBACK: Final = 1
"""Index of `lo`, in every namespace."""

_NEW_LINK, _DELETE_LINK, _NEW_ADDRESS, _GET_ADDRESS, _NEW_ROUTE, _GET_ROUTE = 16, 17, 20, 22, 24, 26
_LINK_NAME, _LINK_INFO, _LINK_NAMESPACE_FILE = 3, 18, 28
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_UP = 1
_ADDRESS, _LOCAL = 1, 2
_DESTINATION, _OUT_INTERFACE, _GATEWAY = 1, 4, 5
_MAIN_TABLE, _BY_ADMINISTRATOR, _UNICAST, _UNREACHABLE = 254, 4, 1, 7


def _link(index: int = 0, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, change)


def _name(name: str) -> bytes:
    return attribute(_LINK_NAME, name.encode() + b"\0")


class Batch:
    """Changes that are made together; `apply` makes them."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.what: list[str] = []

    def _add(self, what: str, kind: int, body: bytes, flags: int = 0) -> Batch:
        self.messages.append(message(kind, REQUEST | ACK | flags, len(self.messages), body))
        self.what.append(what)
        return self

    def veth(self, name: str, peer: str, namespace: int) -> Batch:
        """A pair: `name` here, `peer` in the namespace of the descriptor `namespace`."""
        other = _link() + _name(peer) + attribute(_LINK_NAMESPACE_FILE, struct.pack("=I", namespace))
        info = nest(_LINK_INFO, attribute(_INFO_KIND, b"veth"), nest(_INFO_DATA, attribute(_VETH_PEER, other)))
        return self._add(f"add {name}", _NEW_LINK, _link() + _name(name) + info, CREATE | EXCL)

    def up(self, index: int) -> Batch:
        return self._add(f"set interface {index} up", _NEW_LINK, _link(index, _UP, _UP))

    def delete(self, name: str) -> Batch:
        return self._add(f"delete {name}", _DELETE_LINK, _link() + _name(name))

    def address(self, index: int, address: str) -> Batch:
        """An IPv4 address with its prefix, `10.88.0.1/30`."""
        interface = ipaddress.IPv4Interface(address)
        packed = interface.ip.packed
        body = struct.pack("=BBBBi", socket.AF_INET, interface.network.prefixlen, 0, 0, index)
        body += attribute(_LOCAL, packed) + attribute(_ADDRESS, packed)
        return self._add(f"add address {address}", _NEW_ADDRESS, body, CREATE | EXCL)

    def default_route(self, gateway: str, index: int) -> Batch:
        body = _route(0, _UNICAST) + attribute(_GATEWAY, socket.inet_aton(gateway))
        body += attribute(_OUT_INTERFACE, struct.pack("=i", index))
        return self._add(f"add default route via {gateway}", _NEW_ROUTE, body, CREATE | EXCL)

    def unreachable(self, network: str) -> Batch:
        """No way leads to that IPv4 network."""
        to = ipaddress.IPv4Network(network)
        body = _route(to.prefixlen, _UNREACHABLE) + attribute(_DESTINATION, to.network_address.packed)
        return self._add(f"make {network} unreachable", _NEW_ROUTE, body, CREATE | EXCL)

    def apply(self, link: socket.socket) -> None:
        """In the namespace of the socket. Raises OSError for the first that fails; those behind it are made
        nevertheless."""
        request(link, self.messages, self.what)


def _route(prefix: int, kind: int) -> bytes:
    return struct.pack("=BBBBBBBBI", socket.AF_INET, prefix, 0, 0, _MAIN_TABLE, _BY_ADMINISTRATOR, 0, kind, 0)


def own_addresses(link: socket.socket) -> list[str]:
    """IPv4 addresses of this namespace but for the loopback's. Raises OSError."""
    found = []
    for body in dump(link, _GET_ADDRESS, struct.pack("=BBBBi", socket.AF_INET, 0, 0, 0, 0)):
        given = attributes(body[8:])
        if packed := given.get(_LOCAL, given.get(_ADDRESS)):
            found.append(str(ipaddress.IPv4Address(packed)))
    return [address for address in found if not address.startswith("127.")]


def gateways(link: socket.socket) -> list[str]:
    """Where the default routes (IPv4) of this namespace lead. Raises OSError."""
    found = []
    for body in dump(link, _GET_ROUTE, struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)):
        family, prefix = body[0], body[1]
        gateway = attributes(body[12:]).get(_GATEWAY)
        if family == socket.AF_INET and prefix == 0 and gateway:
            found.append(str(ipaddress.IPv4Address(gateway)))
    return found
