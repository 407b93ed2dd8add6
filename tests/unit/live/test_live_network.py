"""The network of a container: addresses, the netlink messages, and nspawn's command line."""

from __future__ import annotations

import errno
import ipaddress
import os
import struct
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.live import nat, netlink, network, syscalls
from hostos.live.container import Options, nspawn_argv
from hostos.live.manifest import BootConfig
from hostos.live.netlink import attributes
from hostos.live.rtnetlink import LOOPBACK, PROTOCOL, Batch, gateways, own_addresses


@given(st.integers(0, network.MOST - 1), st.integers(0, network.MOST - 1))
def test_networks_are_apart(one: int, other: int) -> None:
    here, there = map(ipaddress.ip_interface, (f"{address}/30" for address in network.addresses(one)))
    assert here.network == there.network
    assert here != there
    assert here.network.subnet_of(ipaddress.ip_network("10.88.0.0/16"))  # type: ignore[arg-type]
    assert {here.ip, there.ip} == set(here.network.hosts())
    assert (ipaddress.ip_interface(f"{network.addresses(other)[0]}/30").network == here.network) == (one == other)


def test_messages_are_well_formed() -> None:
    sequence = []
    for message in nat.messages():
        length, kind, _, number, _ = struct.unpack_from("=IHHII", message)
        assert length == len(message)
        assert length % 4 == 0
        rest = message[20:]
        while rest:
            size = struct.unpack_from("=H", rest)[0]
            assert 4 <= size <= len(rest)
            rest = rest[(size + 3) & ~3 :]
        sequence.append((number, kind))
    assert [number for number, _ in sequence] == list(range(7))
    assert [kind for _, kind in sequence][:1] == [16]
    assert [kind for _, kind in sequence][-1:] == [17]
    chain = attributes(nat.messages()[4][20:])
    assert (chain[3], chain[7]) == (b"outward\0", b"nat\0")
    assert attributes(chain[4]) == {1: struct.pack(">I", 4), 2: struct.pack(">I", 100)}


@given(st.binary(max_size=200))
def test_what_the_kernel_never_sends_is_read_without_a_crash(data: bytes) -> None:
    found = attributes(data)
    assert sum(map(len, found.values())) <= len(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace: needs root")
def test_interfaces_addresses_and_routes(tmp_path: Path) -> None:
    """What the kernel made of the messages, as `ip` reads it; the names of the first that fails."""
    file = tmp_path / "net"
    file.touch()
    with ExitStack() as stack:
        with syscalls.namespace(syscalls.CLONE_NEWNET, "network namespaces") as child:
            syscalls.mount(f"/proc/{child}/ns/net", file, "", syscalls.MS_BIND)
            stack.callback(syscalls.unmount, file)
        with syscalls.inside(file):
            link = stack.enter_context(netlink.open_socket(PROTOCOL))
        namespace = os.open(file, os.O_RDONLY)
        stack.callback(os.close, namespace)
        Batch().veth("one", "other", namespace).up(LOOPBACK).apply(link)
        index = int(ip(file, "-o", "link", "show", "dev", "one").partition(":")[0])
        Batch().address(index, "10.88.0.1/30").up(index).default_route("10.88.0.2", index).apply(link)
        Batch().unreachable("10.99.0.0/16").apply(link)
        assert "inet 10.88.0.1/30" in ip(file, "addr", "show", "dev", "one")
        assert "state UNKNOWN" in ip(file, "link", "show", "dev", "lo")
        assert ip(file, "route").splitlines()[0].startswith("default via 10.88.0.2 dev one")
        assert "unreachable 10.99.0.0/16" in ip(file, "route")
        assert own_addresses(link) == ["10.88.0.1"]
        assert gateways(link) == ["10.88.0.2"]
        with pytest.raises(FileExistsError, match=r"add address 10\.88\.0\.1/30: File exists"):
            Batch().address(index, "10.88.0.1/30").up(index).apply(link)
        Batch().delete("one").apply(link)
        with pytest.raises(OSError, match="delete one: No such device"):
            Batch().delete("one").apply(link)


@pytest.mark.skipif(os.geteuid() != 0, reason="netfilter may only be asked by root")
def test_a_transaction_refused_as_a_whole_is_not_waited_for() -> None:
    """One answer comes then, for all of its messages: its reason, not silence, is what is told."""
    messages = nat.messages()
    begin = bytearray(messages[0])
    begin[18:20] = (99).to_bytes(2, "big")  # a part of netfilter that there is not
    with netlink.open_socket(nat.PROTOCOL) as link, pytest.raises(OSError, match="message 0") as caught:
        netlink.request(link, [bytes(begin), *messages[1:]])
    assert caught.value.errno == errno.EINVAL


def ip(network: Path, *arguments: str) -> str:
    return subprocess.run(
        ["nsenter", f"--net={network}", "ip", *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_command_line_joins_the_network_first() -> None:
    argv = nspawn_argv(Options("web", network="nat"), BootConfig(("x",)), "/root", 524288, "/run/net")
    assert argv[:4] == ["nsenter", "-n/run/net", "--", "systemd-nspawn"]
    assert "--private-network" not in argv
    assert nspawn_argv(Options("web"), BootConfig(("x",)), "/root", 524288)[0] == "systemd-nspawn"
