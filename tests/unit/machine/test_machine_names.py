from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.machine.instance import Instance
from hostos.machine.names import check_hostname, check_machine_name
from hostos.machine.network import Forward, choose_port, is_free, mac_address, parse_publish
from hostos.paths import SOCKET_PATH_LIMIT


@pytest.mark.parametrize("name", ["a", "box1", "Box-1", "1st", "a.example.org", "a" * 63])
def test_hostnames(name: str) -> None:
    assert check_hostname(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "a_b", "a b", "a..b", "ä", "a" * 64, "a.", "x" * 40 + "." + "y" * 40, "a\n"]
)
def test_not_hostnames(name: str) -> None:
    with pytest.raises(UserError) as caught:
        check_hostname(name)
    assert caught.value.status == 2
    assert caught.value.hint


@pytest.mark.parametrize("name", ["", "Box", "../x", "a/b", ".", "..", "a.b", "_a", "a" * 64, "-m"])
def test_not_machine_names(name: str) -> None:
    with pytest.raises(UserError):
        check_machine_name(name)


@given(st.text(max_size=70))
def test_a_machine_name_is_always_a_file_name_and_a_hostname(name: str) -> None:
    try:
        check_machine_name(name)
    except UserError:
        return
    assert check_hostname(name) == name
    assert "/" not in name


@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True))
def test_sockets_can_be_bound_whatever_the_name(name: str) -> None:
    instance = Instance.named(name)
    for path in (instance.monitor_socket, instance.console_socket, instance.agent_socket):
        assert len(str(path)) <= SOCKET_PATH_LIMIT


@pytest.mark.parametrize(
    ("text", "forward"),
    [
        ("8080:80", Forward(8080, 80)),
        ("5353:53/udp", Forward(5353, 53, "udp")),
        ("0.0.0.0:1:65535/tcp", Forward(1, 65535, "tcp", "0.0.0.0")),
    ],
)
def test_publish(text: str, forward: Forward) -> None:
    assert parse_publish(text) == forward


@pytest.mark.parametrize(
    "text",
    [
        "",
        "80",
        "80:",
        ":80",
        "0:80",
        "80:0",
        "65536:1",
        "a:b",
        "1:2:3",
        "1.2.3:1:2",
        "300.1.1.1:1:2",
        "1:2/sctp",
        "1:2,x=y",
    ],
)
def test_publish_refused(text: str) -> None:
    with pytest.raises(UserError, match="--publish"):
        parse_publish(text)


@given(st.text(max_size=30))
def test_publish_never_lets_anything_into_the_command_line(text: str) -> None:
    try:
        forward = parse_publish(text)
    except UserError:
        return
    assert "," not in forward.rule()
    assert 1 <= forward.host_port <= 65535


def test_ports_are_free_for_all_protocols_and_preferred_ones_are_kept() -> None:
    import socket

    port = choose_port("tcp", "udp")
    assert choose_port("tcp", "udp", preferred=port) == port
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("127.0.0.1", port))
        assert not is_free(port, "udp")
        assert is_free(port, "tcp")
        assert choose_port("tcp", "udp", preferred=port) != port
    assert choose_port("tcp", preferred=port, but_not=frozenset({port})) != port


@given(st.text())
def test_mac_addresses_are_stable_unicast_and_local(identity: str) -> None:
    mac = mac_address(identity)
    assert mac == mac_address(identity)
    first, *rest = (int(part, 16) for part in mac.split(":"))
    assert len(rest) == 5
    assert first & 1 == 0
    assert first & 2
