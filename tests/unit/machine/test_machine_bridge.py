"""How a machine is connected: what is asked for, what QEMU is told, how the guest's address becomes known."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from test_machine_qemu import CONFIG

from hostos.errors import UserError
from hostos.machine import address, bridge
from hostos.machine.address import Locator
from hostos.machine.instance import Instance, Run
from hostos.machine.leases import Lease
from hostos.machine.network import Forward, Net, mac_address, parse_net
from hostos.machine.options import UpOptions
from hostos.machine.qemu import command
from hostos.machine.relocate import relocate

MAC = "52:54:00:01:02:03"


@pytest.mark.parametrize("text", ["user", "vmnet", "bridge=br0", "bridge=virbr0-x.1", "tap=t"])
def test_networks_are_read_and_written(text: str) -> None:
    assert str(parse_net(text)) == text
    assert parse_net(text).own_address is (text != "user")


@pytest.mark.parametrize(
    "text", ["", "bridge", "bridge=", "bridge=..", "bridge=a b", "bridge=a,br=x", "bridge=a/b", "tap=sixteen-letters1"]
)
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(UserError, match="is not understood"):
        parse_net(text)


@pytest.mark.parametrize(
    ("net", "more", "expected"),
    [
        (Net("vmnet"), {}, "vmnet-shared,id=net0"),
        (Net("bridge", "br0"), {"tap": "hostos-1"}, "tap,id=net0,ifname=hostos-1,script=no,downscript=no"),
        (Net("bridge", "br0"), {"bridge_helper": Path("/q,h")}, "bridge,id=net0,br=br0,helper=/q,,h"),
        (Net("tap", "mine"), {"tap": "mine"}, "tap,id=net0,ifname=mine,script=no,downscript=no"),
    ],
)
def test_command_lines(net: Net, more: dict[str, object], expected: str) -> None:
    line = command(replace(CONFIG, net=net, **more))  # type: ignore[arg-type]
    assert line[line.index("-netdev") + 1] == expected
    assert f"virtio-net-pci,netdev=net0,mac={CONFIG.mac},romfile=" in line


def test_a_change_of_network_forgets_what_belonged_to_the_old_one() -> None:
    user = UpOptions(publish=(Forward(8080, 80),), memory_mib=512)
    bridged = UpOptions(net="bridge=br0", lease_files=("/l",)).over(user)
    assert bridged == UpOptions(net="bridge=br0", lease_files=("/l",), memory_mib=512)
    bridged.check()
    assert UpOptions(net="bridge=br1").over(bridged).lease_files is None
    assert UpOptions(memory_mib=256).over(bridged).lease_files == ("/l",)
    UpOptions(net="user").over(bridged).check()
    for wrong in (UpOptions(net="bridge=br0", publish=user.publish), UpOptions(lease_files=("/l",))):
        with pytest.raises(UserError):
            wrong.check()
    assert UpOptions.from_json(bridged.to_json()) == bridged


def test_an_instance_without_a_start_is_on_the_user_network() -> None:
    instance = Instance.named("box")
    assert (instance.address, instance.guest_address) == ("127.0.0.1", "10.0.2.15")
    assert (instance.host_address_from_guest, instance.own_address) == ("10.0.2.2", False)


def test_macs_and_taps_are_stable_and_differ() -> None:
    assert mac_address("a") == mac_address("a") != mac_address("b")
    assert mac_address("a").startswith("52:54:00:")
    assert bridge.tap_name("a") == bridge.tap_name("a") != bridge.tap_name("b")
    assert len(bridge.tap_name("a")) == 15


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user who may not make interfaces; a helper that is not installed yet."""
    monkeypatch.setattr(bridge, "may_administer", lambda: False)
    monkeypatch.setattr(bridge, "HELPERS", (tmp_path / "qemu-bridge-helper",))
    monkeypatch.setattr(bridge, "HELPER_RULES", tmp_path / "bridge.conf")
    monkeypatch.setattr(bridge, "TUN", tmp_path / "tun")
    (tmp_path / "tun").touch()
    return tmp_path


def test_what_the_helper_lacks_is_said_one_by_one(unprivileged: Path) -> None:
    helper, rules = unprivileged / "qemu-bridge-helper", unprivileged / "bridge.conf"
    with pytest.raises(UserError, match="not installed"):
        bridge.find_helper("br0")
    helper.touch()
    with pytest.raises(UserError, match="no privileges") as caught:
        bridge.find_helper("br0")
    assert caught.value.hint.startswith(f"sudo chmod u+s {helper}")
    helper.chmod(0o4755)
    if not helper.stat().st_mode & 0o4000:
        pytest.skip("no set-uid files here")
    for text in (None, "", "allow br1\n", "allow br0\ndeny br0\n", "deny all\nallow br0\n"):
        if text is not None:
            rules.write_text(text)
        with pytest.raises(UserError, match="not allowed") as caught:
            bridge.find_helper("br0")
        assert "allow br0" in caught.value.hint
    for text in ("# x\nallow br0\n", "allow all\n", "include /etc/qemu/user.conf\n"):
        rules.write_text(text)
        assert bridge.find_helper("br0") == helper
    (unprivileged / "tun").unlink()
    with pytest.raises(UserError, match="may not open") as caught:
        bridge.find_helper("br0")
    assert "chmod 666" in caught.value.hint


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="bridges are Linux's")
def test_the_loopback_is_no_bridge() -> None:
    with pytest.raises(UserError, match="there is no bridge 'br-none'"):
        bridge.check_bridge("br-none")
    with pytest.raises(UserError, match="'lo' is not a bridge"):
        bridge.check_bridge("lo")
    with pytest.raises(UserError, match="'lo' is not a tap"):
        bridge.check_tap("lo")


@dataclass
class Known:
    """A source whose leases the test decides."""

    known: list[Lease]
    name: str = "a file"
    fault: str = ""

    def leases(self) -> Sequence[Lease]:
        return self.known


@pytest.fixture
def agent() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, guest = socket.socketpair()
    ours.setblocking(False)
    with ours, guest:
        yield ours, guest


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "_EVERY", 0.0)


def lease(where: str, seconds: float = 3600.0) -> Lease:
    return Lease(where, MAC, "box", time.time() + seconds)


def test_a_lease_of_this_start_is_taken_at_once_an_old_one_is_not() -> None:
    source = Known([lease("10.0.0.1")])
    locator = Locator([source], MAC, "box")
    assert locator.look() is None
    source.known = [lease("10.0.0.1", 7200)]
    found = locator.look()
    assert found is not None
    assert (found.lease.address, found.source) == ("10.0.0.1", "a file")
    source.known = [lease("10.0.0.2", 9000)]
    found = locator.look()
    assert found is not None
    assert found.lease.address == "10.0.0.2"


def test_an_old_lease_is_taken_when_the_guest_speaks_or_after_a_while(
    agent: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, guest = agent
    source = Known([lease("10.0.0.1")])
    locator = Locator([source], MAC, "box", agent=ours)
    guest.sendall(b"netw")
    assert locator.look() is None
    # As OS builds before this one said it.
    guest.sendall(b"ork\n")
    assert locator.look() is not None
    assert locator.announced
    late = Locator([source], MAC, "box")
    assert late.look() is None
    monkeypatch.setattr(address, "OLD_LEASE_SECONDS", 0.0)
    assert late.look() is not None


def test_what_the_guest_says_is_believed_where_no_file_tells(
    agent: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, guest = agent
    source = Known([lease("10.0.0.1")])
    locator = Locator([source], MAC, "box", agent=ours)
    guest.sendall(b"hello\nnetwork 10.0.0.7\n")
    # A server that is here writes it down in a moment.
    assert locator.look() is None
    monkeypatch.setattr(address, "_GRACE", 0.0)
    # A loaded host may look once in that time, and see a file half written.
    assert [locator.look() for _ in range(3)] == [None, None, None]
    found = locator.look()
    assert found is not None
    assert (found.lease.address, found.source) == ("10.0.0.7", "said by the guest")
    source.known = [lease("10.0.0.7", 7200)]
    found = locator.look()
    assert found is not None
    assert found.source == "a file"
    # It changes its address later; and then the connection ends.
    guest.sendall(b"network 127.0.0.1\nnetwork 10.0.0.9\n")
    guest.close()
    for _ in range(5):
        found = locator.look()
    assert found is not None
    assert found.lease.address == "10.0.0.9"


def test_time_alone_or_looks_alone_do_not_make_the_guest_believed(
    agent: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, guest = agent
    locator = Locator([Known([])], MAC, "box", agent=ours)
    guest.sendall(b"network 10.0.0.7\n")
    assert {locator.look() for _ in range(20)} == {None}
    monkeypatch.setattr(address, "_GRACE", 0.0)
    found = locator.look()
    assert found is not None
    assert found.source == "said by the guest"
    # Where there is no file, none is waited for.
    ours, guest = socket.socketpair()
    ours.setblocking(False)
    with ours, guest:
        guest.sendall(b"network 10.0.0.8\n")
        found = Locator([Known([], fault="not there")], MAC, "box", agent=ours).look()
    assert found is not None
    assert found.lease.address == "10.0.0.8"


def test_why_nothing_was_found() -> None:
    absent, other = Known([], "one", "not there"), Known([Lease("10.0.0.1", "02:00:00:00:00:01")], "two")
    assert Locator([absent, other], MAC, "box").why_not() == "two: none of this machine"
    assert Locator([absent], MAC, "box").why_not() == "one: not there"
    assert Locator([], MAC, "box").why_not() == "no lease file is watched"


def test_a_guest_that_has_moved_is_found_by_its_lease(tmp_path: Path) -> None:
    instance = Instance.named("box")
    instance.make_directory()
    instance.make_socket_dir()
    file = tmp_path / "leases"
    later = int(time.time()) + 3600
    started = Run(
        pid=1, process_start="", started_at=0, hostname="box", ssh_port=22, swarm_port=6881, accelerator="tcg",
        accelerator_reason="", cpus=1, memory_mib=1, os_directory="", kernel_version="", command=[],
        net="bridge=br0", guest_address="10.0.0.1", host_address="10.0.0.254", found_by="x", mac=MAC,
        lease_files=[str(file)],
    )  # fmt: skip
    # No file, and nothing new in it: as it was.
    assert relocate(instance, started) is started
    file.write_text(f"{later} {MAC} 10.0.0.1 box *\n")
    assert relocate(instance, started) is started
    file.write_text(f"{later} {MAC} 10.0.0.1 box *\n{later + 9} {MAC} 127.0.0.1 box *\n")
    assert relocate(instance, started) is started
    file.write_text(f"{later} {MAC} 10.0.0.1 box *\n{later + 9} {MAC} 10.0.0.2 box *\n")
    assert relocate(instance, started).guest_address == "10.0.0.2"
    assert instance.address == "10.0.0.2"
    assert "HostName 10.0.0.2\n" in instance.ssh_config.read_text()
