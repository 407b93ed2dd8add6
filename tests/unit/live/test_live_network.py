"""The network of a container: addresses, the netlink messages, and nspawn's command line."""

from __future__ import annotations

import ipaddress
import struct

from hypothesis import given
from hypothesis import strategies as st

from hostos.live import nat, network
from hostos.live.container import Options, nspawn_argv
from hostos.live.manifest import BootConfig


@given(st.integers(0, network.MOST - 1), st.integers(0, network.MOST - 1))
def test_networks_are_apart(one: int, other: int) -> None:
    here, there = map(ipaddress.ip_interface, (f"{address}/30" for address in network.addresses(one)))
    assert here.network == there.network
    assert here != there
    assert here.network.subnet_of(ipaddress.ip_network("10.88.0.0/16"))  # type: ignore[arg-type]
    assert {here.ip, there.ip} == set(here.network.hosts())
    assert (ipaddress.ip_interface(f"{network.addresses(other)[0]}/30").network == here.network) == (one == other)


def attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while data:
        length, kind = struct.unpack_from("=HH", data)
        assert 4 <= length <= len(data)
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


def test_messages_are_well_formed() -> None:
    sequence = []
    for message in nat.messages():
        length, kind, _, number, _ = struct.unpack_from("=IHHII", message)
        assert length == len(message)
        assert length % 4 == 0
        attributes(message[20:])
        sequence.append((number, kind))
    assert [number for number, _ in sequence] == list(range(7))
    assert [kind for _, kind in sequence][:1] == [16]
    assert [kind for _, kind in sequence][-1:] == [17]
    chain = attributes(nat.messages()[4][20:])
    assert (chain[3], chain[7]) == (b"outward\0", b"nat\0")
    assert attributes(chain[4]) == {1: struct.pack(">I", 4), 2: struct.pack(">I", 100)}


def test_command_line_joins_the_network_first() -> None:
    argv = nspawn_argv(Options("web", network="nat"), BootConfig(("x",)), "/root", 524288, "/run/net")
    assert argv[:4] == ["nsenter", "-n/run/net", "--", "systemd-nspawn"]
    assert "--private-network" not in argv
    assert nspawn_argv(Options("web"), BootConfig(("x",)), "/root", 524288)[0] == "systemd-nspawn"
