"""Machines on a bridge, with a real DHCP server in a network namespace of its own.

The launcher, the bridge and QEMU live in one namespace ("the host"), dnsmasq in another, joined to the bridge by a
pair of virtual cards. Nothing of this machine's own network is touched.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hostos.machine import bridge

pytestmark = [
    pytest.mark.boot,
    pytest.mark.fault,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces and bridges: needs root"),
    pytest.mark.skipif(not (shutil.which("dnsmasq") and shutil.which("ip")), reason="needs dnsmasq and iproute2"),
]
BRIDGE = "br-lab"
SERVER = "192.168.77.2"


@dataclass
class Lab:
    """The two namespaces. `leases`: dnsmasq's file."""

    host: str
    server: str
    place: Path
    dnsmasq: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def ip(self, *words: str) -> str:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    @property
    def leases(self) -> Path:
        return self.place / "leases"

    def build(self) -> None:
        for name in (self.host, self.server):
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        self.ip("-n", self.host, "link", "add", BRIDGE, "type", "bridge")
        self.ip("-n", self.host, "addr", "add", "192.168.77.1/24", "dev", BRIDGE)
        self.ip("-n", self.host, "link", "set", BRIDGE, "up")
        self.ip("link", "add", "uplink", "netns", self.host, "type", "veth", "peer", "eth0", "netns", self.server)
        self.ip("-n", self.host, "link", "set", "uplink", "master", BRIDGE, "up")
        self.ip("-n", self.server, "addr", "add", f"{SERVER}/24", "dev", "eth0")
        self.ip("-n", self.server, "link", "set", "eth0", "up")

    def serve(self) -> None:
        words = [
            "--no-daemon",
            "--conf-file=/dev/null",
            "--port=0",
            "--interface=eth0",
            "--bind-interfaces",
            "--user=root",
        ]
        words += ["--dhcp-range=192.168.77.50,192.168.77.99,1h", "--dhcp-authoritative", "--no-ping"]
        with (self.place / "dnsmasq.log").open("wb") as log:
            self.dnsmasq = subprocess.Popen(
                ["ip", "netns", "exec", self.server, "dnsmasq", *words, f"--dhcp-leasefile={self.leases}"],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    def taps(self) -> list[str]:
        found = json.loads(self.ip("-n", self.host, "-j", "link", "show", "master", BRIDGE) or "[]")
        return [each["ifname"] for each in found if each["ifname"] != "uplink"]

    def tear_down(self) -> None:
        if self.dnsmasq is not None:
            self.dnsmasq.terminate()
            self.dnsmasq.wait(10)
        for name in (self.host, self.server):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="lab-") as place:
        made = Lab(f"host-{os.getpid()}", f"dhcp-{os.getpid()}", Path(place))
        try:
            made.build()
            yield made
        finally:
            made.tear_down()


@pytest.fixture
def inside(lab: Lab, hostos: Any) -> Any:
    """The `hostos` command in the host's namespace."""
    plain = hostos.words
    hostos.words = lambda *words: ["ip", "netns", "exec", lab.host, *plain(*words)]
    return hostos


def bridged(lab: Lab, *words: str | Path) -> list[str]:
    return ["--memory", "256", "--net", f"bridge={BRIDGE}", "--lease-file", str(lab.leases), *map(str, words)]


def until(condition: Any, seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.05)


def test_two_machines_find_their_leases_and_each_other(lab: Lab, inside: Any) -> None:
    lab.serve()
    both = [inside.start("up", "-m", name, "--os", inside.os_dir, *bridged(lab)) for name in ("one", "two")]
    for each in both:
        _, err = each.communicate(timeout=300)
        assert each.returncode == 0, err.decode()
        assert f", {lab.leases})" in err.decode()
    one, two = (inside("status", "-m", name, "--json").json() for name in ("one", "two"))
    given = {
        line.split()[2]: line.split()[3]
        for line in lab.leases.read_text().splitlines()
        if " one " in line or " two " in line
    }
    assert {one["address"]: "one", two["address"]: "two"} == given
    assert [stage["name"] for stage in one["stages"]] == [
        "QEMU started",
        "monitor answers",
        "guest speaks",
        "lease found",
        "SSH answers",
        "key accepted",
        "system is up",
    ]
    assert one["net"] == f"bridge={BRIDGE}"
    assert inside("ip", "-m", "one").ok().out == f"{one['address']}\n"
    assert len(lab.taps()) == 2
    # SSH by the generated configuration, at the leased address, and from guest to guest.
    assert f"HostName {two['address']}\n" in Path(two["ssh"]["config"]).read_text()
    assert inside("ssh", "-m", "two", "--", "hostname").ok().out == "two\n"
    assert "1 packets received" in inside("ssh", "-m", "one", "--", f"ping -c 1 -W 10 {two['address']}").ok().out
    refused = inside("port", "add", "-m", "one", "8080:80")
    assert refused.status == 2
    assert f"connect to {one['address']}:80" in refused.err

    # However a machine ends, its tap is gone.
    assert inside("down", "-m", "one", "--json").json()["clean"] is True
    until(lambda: len(lab.taps()) == 1)
    os.kill(two["pid"], signal.SIGKILL)
    until(lambda: lab.taps() == [])
    # The network of the last start is remembered; the same machine gets the same address again.
    again = inside("up", "-m", "two", "--json").json()
    assert (again["net"], again["address"]) == (two["net"], two["address"])
    inside("kill", "-m", "two").ok()
    until(lambda: lab.taps() == [])


def test_a_dhcp_server_that_comes_late_and_a_file_that_is_replaced(lab: Lab, inside: Any) -> None:
    """The watched file appears late, is replaced again and again, also by halves and by an old lease."""
    shown = lab.place / "shown"
    stop = threading.Event()

    def publish() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            text = lab.leases.read_text() if lab.leases.exists() else ""
            if text or number > 20:
                part = lab.place / "part"
                part.write_text(text if number % 4 else text[: len(text) // 2])
                part.replace(shown)
            time.sleep(0.03)

    publisher = threading.Thread(target=publish)
    publisher.start()
    try:
        words = ["--memory", "256", "--net", f"bridge={BRIDGE}", "--lease-file", f"dnsmasq:{shown}"]
        up = inside.start("up", "--os", inside.os_dir, "--json", *words)
        until(lambda: lab.taps(), 60)
        # By then the guest has been asking for a while.
        time.sleep(8)
        assert up.poll() is None
        lab.serve()
        out, err = up.communicate(timeout=240)
        assert up.returncode == 0, err.decode()
        facts = json.loads(out.splitlines()[-1])
        assert f" {facts['address']} default " in lab.leases.read_text()
        assert facts["found_by"] == f"{shown} (dnsmasq)"
    finally:
        stop.set()
        publisher.join()


def test_a_launcher_that_is_killed_leaves_no_tap_that_is_in_the_way(lab: Lab, inside: Any) -> None:
    lab.serve()
    up = inside.start("up", "--os", inside.os_dir, *bridged(lab))
    until(lambda: lab.taps(), 60)
    up.kill()
    up.communicate()
    # QEMU goes on alone; the next start ends it, and its tap with it.
    assert inside("status", "--json").json()["state"] == "interrupted"
    (tap,) = lab.taps()
    facts = inside("up", "--json").json()
    assert lab.taps() == [tap]
    assert f" {facts['address']} default " in lab.leases.read_text()
    assert inside("ssh", "--", "true").status == 0


def test_no_dhcp_server(lab: Lab, inside: Any) -> None:
    """A clear message, and nothing left: neither QEMU nor tap."""
    inside.environment["HOSTOS_TIMEOUT_SCALE"] = "0.15"
    failed = inside.up(*bridged(lab))
    assert failed.status == 1
    assert "no DHCP lease for 52:54:00:" in failed.err
    assert f"{lab.leases}: not there" in failed.err
    assert "--lease-file PATH" in failed.err
    assert inside.qemus() == []
    assert lab.taps() == []


def test_the_guest_tells_its_address_where_no_file_does(lab: Lab, inside: Any) -> None:
    """A DHCP server somewhere on the network, whose leases this host cannot read. And: live boot from this host's
    seed, which listens on the bridge for this machine alone."""
    lab.serve()
    facts = inside.up("--memory", "384", "--net", f"bridge={BRIDGE}", "--json").json()
    assert facts["found_by"] == "said by the guest"
    assert f" {facts['address']} default " in lab.leases.read_text()

    tree = lab.place / "tree"
    (tree / "usr" / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "usr" / "bin" / "busybox")
    (tree / "etc").mkdir()
    (tree / "etc" / "os-release").write_text("ID=bridged\n")
    image = inside("image", "publish", tree, "--name", "bridged").ok().out.strip()
    try:
        ran = inside("container", "boot", image, "--bare", "--", "/usr/bin/busybox", "cat", "/etc/os-release").ok()
        assert ran.out == "ID=bridged\n"
        seed = inside("seed", "status", "--json").json()
        assert seed["also"] == [f"192.168.77.1:{seed['port']}"]
        assert seed["admitted"] == [facts["address"]]
        # Somebody else on that network is let in by TCP and shown the door.
        stranger = (
            f"import socket; s = socket.create_connection(('192.168.77.1', {seed['port']}), 10); s.settimeout(10)"
        )
        stranger += "; s.sendall(b'\\x13BitTorrent protocol' + bytes(48)); print(s.recv(100))"
        words = ["ip", "netns", "exec", lab.server, "python3", "-c", stranger]
        shown = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert shown.stdout == "b''\n" or "ConnectionResetError" in shown.stderr, shown
        refused = inside("container", "boot", "--peer", "127.0.0.1:1", image, "--", "/usr/bin/busybox", "true")
        assert refused.status == 2
        assert "is on this host's loopback" in refused.err
    finally:
        inside("seed", "stop")


def test_what_is_no_bridge_is_refused(lab: Lab, inside: Any) -> None:
    lab.ip("-n", lab.host, "link", "add", "br-down", "type", "bridge")
    for net, says in [
        ("bridge=br-none", f"bridges of this host: br-down, {BRIDGE}"),
        ("bridge=uplink", f"it belongs to one: --net bridge={BRIDGE}"),
        ("bridge=lo", "'lo' is not a bridge"),
        ("bridge=br-down", "ip link set br-down up"),
        ("tap=none", "ip tuntap add none mode tap"),
        ("tap=uplink", "is not a tap"),
        ("vmnet", "vmnet is macOS's"),
        ("bridge", "is not understood"),
    ]:
        refused = inside.up("--net", net)
        assert refused.status == 2, net
        assert says in refused.err, refused.err
    refused = inside.up("--net", f"bridge={BRIDGE}", "--publish", "8080:80")
    assert refused.status == 2
    assert "the guest has an address of its own" in refused.err
    assert not (inside.home / "state").exists()


def test_a_tap_made_by_somebody_else(lab: Lab, inside: Any) -> None:
    """For whoever may not make one: it stays when the machine ends."""
    lab.serve()
    lab.ip("-n", lab.host, "tuntap", "add", "mytap", "mode", "tap")
    lab.ip("-n", lab.host, "link", "set", "mytap", "master", BRIDGE, "up")
    words = ["--memory", "256", "--net", "tap=mytap", "--lease-file", str(lab.leases)]
    facts = inside.up("--json", *words).json()
    assert f" {facts['address']} default " in lab.leases.read_text()
    second = inside.up("-m", "second", *words)
    assert second.status == 2, second.err
    assert "tap 'mytap' is in use by machine 'default'" in second.err

    # The DHCP server gives it another address; it is found there, and by the generated ssh_config too.
    inside(
        "ssh", "--", "sysctl -w net.ipv4.conf.eth0.promote_secondaries=1; ip addr add 192.168.77.200/24 dev eth0"
    ).ok()
    assert lab.dnsmasq is not None
    lab.dnsmasq.terminate()
    lab.dnsmasq.wait(10)
    part = lab.place / "part"
    part.write_text(lab.leases.read_text().replace(facts["address"], "192.168.77.200").replace("17", "27", 1))
    part.replace(lab.leases)
    inside("ssh", "--", f"ip addr del {facts['address']}/24 dev eth0").ok()
    assert inside("ip").ok().out == "192.168.77.200\n"
    assert inside("run", "--", "hostname").ok().out == "default\n"
    assert "HostName 192.168.77.200\n" in Path(facts["ssh"]["config"]).read_text()
    inside("down").ok()
    assert lab.taps() == ["mytap"]


# Root's, as an administrator sets it up, in a mount namespace that ends with the command.
AS_SOMEBODY = """set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$1/upper,workdir=$1/work" /etc
mkdir -p /etc/qemu
[ -z "$2" ] || echo "allow $2" > /etc/qemu/bridge.conf
cp "$3" "$1/helper"
chmod 4755 "$1/helper"
mount --bind "$1/helper" "$3"
mknod -m 666 "$1/tun" c 10 200
chmod 666 "$1/tun"
mount --bind "$1/tun" /dev/net/tun
shift 3
exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search "$@"
"""


def test_somebody_who_is_not_root_with_qemus_helper(lab: Lab, inside: Any) -> None:
    """The real set-uid helper, and a share that is the user's own. (The test's Python is where only root may read.)"""
    helper = next((path for path in bridge.HELPERS if path.is_file()), None)
    if helper is None:
        pytest.skip("needs qemu-bridge-helper")
    lab.serve()
    scratch = lab.place / "scratch"
    scratch.mkdir()
    lab.place.chmod(0o755)
    plain = inside.words
    for directory in (inside.home.parent, lab.place):
        os.chown(directory, 65534, 65534)
    allowed = ""

    def words(*command: str) -> list[str]:
        netns, python = plain()[:4], plain(*command)[4:]
        return [*netns, "unshare", "-m", "sh", "-c", AS_SOMEBODY, "sh", str(scratch), allowed, str(helper), *python]

    inside.words = words
    refused = inside.up(*bridged(lab))
    assert refused.status == 2
    assert "is not allowed to by /etc/qemu/bridge.conf" in refused.err
    allowed = BRIDGE
    lab.leases.touch()
    shared = lab.place / "shared"
    shared.mkdir()
    os.chown(shared, 65534, 65534)
    facts = inside.up("--json", "--share", f"{shared}:/mnt/shared", *bridged(lab)).json()
    assert f" {facts['address']} default " in lab.leases.read_text()
    assert Path(f"/proc/{facts['pid']}").stat().st_uid == 65534
    assert len(lab.taps()) == 1
    inside("ssh", "--", "echo mine > /mnt/shared/file; mknod /mnt/shared/device c 1 1 || true").ok()
    assert (shared / "file").stat().st_uid == 65534
    assert not (shared / "device").exists()
    inside("down").ok()
    until(lambda: lab.taps() == [])
