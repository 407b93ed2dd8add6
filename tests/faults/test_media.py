"""Media for real machines, booted: under BIOS and UEFI, from CDs, disks and the network, with nothing else but a peer.

What depends on the firmware and the medium is tested with the OS under test, which knows virtual network cards only;
what depends on drivers with the OS of the profile `metal`, where it has been built (HOSTOS_TEST_METAL names another).
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bare
import pytest
from bare import Bare

pytestmark = [pytest.mark.boot, pytest.mark.fault, pytest.mark.timeout(1800)]
REPOSITORY = Path(__file__).parents[2]
PXELINUX = (Path("/usr/lib/PXELINUX/pxelinux.0"), Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"))
HOST = "192.168.78.1"


@pytest.fixture(scope="module")
def x86(os_dir: Path) -> Path:
    """The OS under test."""
    if not os_dir.name.endswith("-x86_64"):
        pytest.skip("media are made for x86_64")
    return os_dir


@pytest.fixture(scope="module")
def metal() -> Path:
    directory = Path(os.environ.get("HOSTOS_TEST_METAL", REPOSITORY / "dist" / "metal-x86_64"))
    if not (directory / "manifest.json").is_file():
        pytest.skip("needs the OS for real machines (invoke build --profile metal)")
    return directory


@dataclass(frozen=True)
class Peer:
    """The `hostos` command, and the address of its seed as user networking calls it."""

    hostos: Any
    address: str

    def export(self, os_dir: Path, image: str, *words: str | Path) -> None:
        self.hostos("export", image, "--os", os_dir, "--peer", self.address, *words).ok()


@pytest.fixture(scope="module")
def peer(session_hostos: Any) -> Iterator[Peer]:
    port = session_hostos("seed", "start", "--json").json()["port"]
    yield Peer(session_hostos, f"10.0.2.2:{port}")
    session_hostos("seed", "stop")


@pytest.fixture(scope="module")
def probe(peer: Peer, tmp_path_factory: pytest.TempPathFactory) -> str:
    tree = bare.make_probe(tmp_path_factory.mktemp("probe"))
    return str(peer.hostos("image", "publish", tree, "--name", "probe").ok().out.strip())


@pytest.fixture(scope="module")
def disc(peer: Peer, x86: Path, probe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probe's, with the OS under test."""
    file = tmp_path_factory.mktemp("disc") / "probe.iso"
    peer.export(x86, probe, "--iso", file)
    return file


@pytest.fixture(scope="module")
def stick(peer: Peer, metal: Path, probe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probe's, with the OS for real machines."""
    file = tmp_path_factory.mktemp("stick") / "probe.img"
    peer.export(metal, probe, "--usb", file)
    return file


def check(said: dict[str, list[str]], firmware: str, image: str) -> None:
    assert said["firmware"] == [firmware]
    assert f"hostos.root={image}" in said["command line"][0].split()
    assert "overlay" in said["root"][0]


@pytest.mark.parametrize(("firmware", "disk"), [("BIOS", "cd"), ("UEFI", "cd"), ("UEFI", "usb")])
def test_one_file_is_a_disc_and_a_stick(firmware: str, disk: str, disc: Path, probe: str, tmp_path: Path) -> None:
    check(Bare(tmp_path, firmware, disc, disk).run(), firmware, probe)


def test_one_program_on_a_fat_file_system(peer: Peer, x86: Path, probe: str, tmp_path: Path) -> None:
    program, fat = tmp_path / "probe.efi", tmp_path / "fat.img"
    peer.export(x86, probe, "--uki", program)
    subprocess.run(["mformat", "-C", "-i", fat, "-T", str(128 << 11), "::"], check=True)
    subprocess.run(["mmd", "-i", fat, "::/EFI", "::/EFI/BOOT"], check=True)
    subprocess.run(["mcopy", "-i", fat, program, "::/EFI/BOOT/BOOTX64.EFI"], check=True)
    check(Bare(tmp_path, "UEFI", fat, "virtio").run(), "UEFI", probe)


@dataclass
class Lan:
    """A network namespace: this host's address, a tap for the machine, dnsmasq, and whatever `hostos` starts."""

    name: str
    place: Path

    def build(self) -> None:
        for words in (
            ("netns", "add", self.name),
            ("-n", self.name, "link", "set", "lo", "up"),
            ("-n", self.name, "tuntap", "add", "dev", "tap0", "mode", "tap"),
            ("-n", self.name, "addr", "add", f"{HOST}/24", "dev", "tap0"),
            ("-n", self.name, "link", "set", "tap0", "up"),
        ):
            subprocess.run(["ip", *words], check=True)

    @property
    def inside(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    def serve(self, directory: Path, *words: str) -> subprocess.Popen[bytes]:
        """dnsmasq as docs/root.md starts it."""
        plain = ["--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=tap0", "--bind-dynamic", "--no-ping"]
        plain += [
            "--user=root",
            f"--dhcp-leasefile={self.place / 'leases'}",
            "--dhcp-range=192.168.78.50,192.168.78.99",
        ]
        plain += ["--enable-tftp", f"--tftp-root={directory}"]
        with (self.place / "dnsmasq.log").open("wb") as log:
            return subprocess.Popen(
                [*self.inside, "dnsmasq", *plain, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def tear_down(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)


@pytest.fixture
def lan(tmp_path: Path) -> Iterator[Lan]:
    if os.geteuid() != 0 or not (shutil.which("dnsmasq") and shutil.which("ip")):
        pytest.skip("makes a network namespace: needs root, dnsmasq and iproute2")
    made = Lan(f"media-{os.getpid()}", tmp_path)
    try:
        made.build()
        yield made
    finally:
        made.tear_down()


# What a boot server of BIOS and UEFI machines says, and what one of iPXE's and PXELINUX's.
BOOT = {
    "BIOS": (
        "--dhcp-match=set:efi,option:client-arch,7",
        "--dhcp-boot=tag:efi,hostos.efi",
        "--dhcp-boot=tag:!efi,hostos.0",
    ),
    "iPXE": ("--dhcp-boot=hostos.ipxe",),
    "PXELINUX": ("--dhcp-boot=pxelinux.0",),
}
BOOT["UEFI"] = BOOT["BIOS"]


@pytest.mark.parametrize("way", ["BIOS", "UEFI", "iPXE", "PXELINUX"])
def test_a_boot_server(way: str, hostos: Any, x86: Path, lan: Lan, tmp_path: Path) -> None:
    """A real dnsmasq; the seed, too, is on this network only."""
    plain = hostos.words
    hostos.words = lambda *words: [*lan.inside, *plain(*words)]
    image = hostos("image", "publish", bare.make_probe(tmp_path / "tree"), "--name", "probe").ok().out.strip()
    port = hostos("seed", "start", "--listen", HOST, "--json").json()["port"]
    served = tmp_path / "tftp"
    hostos("export", image, "--os", x86, "--peer", f"{HOST}:{port}", "--pxe", served).ok()
    if way == "PXELINUX":
        if not all(file.is_file() for file in PXELINUX):
            pytest.skip("needs PXELINUX (apt-get install pxelinux syslinux-common)")
        for file in PXELINUX:
            shutil.copy(file, served)
    with lan.serve(served, *BOOT[way]) as dnsmasq:
        try:
            firmware = "UEFI" if way == "UEFI" else "BIOS"
            net = "tap,ifname=tap0,script=no,downscript=no"
            said = Bare(tmp_path, firmware, net=net, inside=lan.inside).run()
        finally:
            dnsmasq.terminate()
            # While there is the namespace it was started in.
            hostos("seed", "stop")
    check(said, firmware, image)
    log = (tmp_path / "dnsmasq.log").read_text()
    wanted = {"BIOS": "hostos.0", "UEFI": "hostos.efi", "iPXE": "hostos.ipxe", "PXELINUX": "pxelinux.cfg/default"}[way]
    assert f"sent {served}/{wanted} to 192.168.78." in log


@pytest.mark.parametrize(
    ("firmware", "disk", "card", "driver"),
    [
        ("BIOS", "cd", "e1000", "e1000"),
        ("UEFI", "cd", "e1000e", "e1000e"),
        ("BIOS", "usb", "rtl8139", "8139cp"),
        ("UEFI", "usb", "vmxnet3", "vmxnet3"),
        ("BIOS", "ahci", "e1000e", "e1000e"),
        ("UEFI", "ahci", "pcnet", "pcnet32"),
        ("BIOS", "nvme", "virtio-net-pci", "virtio_net"),
        ("UEFI", "nvme", "i82559c", "e100"),
    ],
)
def test_drivers_of_real_machines(
    firmware: str, disk: str, card: str, driver: str, stick: Path, probe: str, tmp_path: Path
) -> None:
    said = Bare(tmp_path, firmware, stick, disk, card).run()
    check(said, firmware, probe)
    assert [Path(each).name for each in said["card"]] == [driver]
    if disk != "cd":
        # It, too, is seen by the system: a place for what is fetched and kept.
        name = {"usb": "/usb", "ahci": "/ata", "nvme": "/nvme"}[disk]
        assert any(name in each for each in said["disk"]), said


@pytest.mark.parametrize(("firmware", "disk", "card"), [("BIOS", "usb", "e1000e"), ("UEFI", "nvme", "e1000")])
def test_a_medium_boots_a_machine_into_a_debian(
    firmware: str, disk: str, card: str, peer: Peer, system: str, x86: Path, tmp_path: Path, record_property: Any
) -> None:
    """With the OS for real machines, or, where there is none, with the OS under test and its virtual network card."""
    built = Path(os.environ.get("HOSTOS_TEST_METAL", REPOSITORY / "dist" / "metal-x86_64"))
    if not (built / "manifest.json").is_file():
        built, card = x86, "virtio-net-pci"
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    medium = tmp_path / "medium.img"
    # What the serial line says is the last console's.
    words = ("--key", f"{key}.pub", "--hostname", "bare", "--append", "console=ttyS0", "--usb", medium)
    peer.export(built, system, *words)
    machine = Bare(tmp_path, firmware, medium, disk, card, net="user,hostfwd=tcp:127.0.0.1:0-:22")
    with machine.start() as qemu:
        try:
            command = "hostname; cat /proc/1/comm /sys/class/net/eth0/device/uevent /proc/cmdline; findmnt -no FSTYPE /"
            shown, seconds = bare.wait_for_login(qemu, machine, key, command)
            lines = shown.splitlines()
            assert lines[:2] == ["bare", "systemd"]
            assert lines[-1] == "overlay"
            assert f"hostos.root={system}" in shown
            if card != "virtio-net-pci":
                assert f"DRIVER={card}" in shown
            record_property("seconds", round(seconds, 1))
            print(f"{firmware}, {disk}, {card}: {medium.stat().st_size / 1e6:.1f} MB, login after {seconds:.1f} s")
            # A login on the serial line, too; nobody is logged in there by himself.
            until = time.monotonic() + 60
            while "bare login:" not in machine.text():
                assert time.monotonic() < until, machine.text()[-2000:]
                time.sleep(0.5)
        finally:
            qemu.kill()


def test_what_cannot_be_written_is_refused(peer: Peer, x86: Path, probe: str, tmp_path: Path) -> None:
    """With a message, and nothing half-written left."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "key").write_text("no key")
    target = ("--iso", place / "a.iso")
    good = (probe, "--os", x86, "--peer", peer.address)
    small = 'mount -t tmpfs -o size=9m none $0 && "$@"; status=$?; ls -A $0; exit $status'
    for words, status, said in (
        ((probe, "--peer", peer.address, *target), 2, "invoke build --profile metal"),
        ((probe, "--os", tmp_path / "none", "--peer", peer.address, *target), 2, "does not exist"),
        (("nobody/knows", "--os", x86, "--peer", peer.address, *target), 2, "nobody/knows"),
        ((probe, "--os", x86, *target), 2, "--peer HOST:PORT"),
        ((probe, "--os", x86, "--peer", "127.0.0.1:6881", *target), 2, "loopback"),
        ((*good, "--key", place / "none", *target), 2, "does not exist"),
        ((*good, "--key", place / "key", *target), 2, "key"),
        ((*good, "--hostname", "-no-", *target), 2, "not a hostname"),
        ((*good, *target, "--usb", place / "a.iso"), 2, "two media"),
        (good, 2, "what kind of medium"),
        ((*good, "--iso", "/dev/null"), 2, "is a device"),
        ((*good, "--pxe", place), 2, "is not empty"),
        ((*good, "--iso", "/proc/a.iso"), 2, "0 MB are free"),
    ):
        refused = peer.hostos("export", *words)
        assert (refused.status, said in refused.err) == (status, True), (words, refused)
        assert "Traceback" not in refused.err
        assert [each.name for each in place.iterdir()] == ["key"]
    words = ["unshare", "-rm", "sh", "-c", small, str(place), *peer.hostos.words("export", *good, *target)]
    full = subprocess.run(words, env=peer.hostos.env(), capture_output=True, text=True, check=False)
    if "unshare" in full.stderr:
        pytest.skip("makes a user namespace, which is refused here")
    assert (full.returncode, full.stdout) == (2, "")
    assert "MB are free" in full.stderr


def test_the_same_inputs_are_the_same_bytes(peer: Peer, x86: Path, probe: str, tmp_path: Path) -> None:
    """Of every kind, of a real OS build, written at different times to different places."""
    for place in (tmp_path / "one", tmp_path / "two"):
        place.mkdir()
        targets = (
            "--iso",
            place / "a.iso",
            "--usb",
            place / "a.img",
            "--uki",
            place / "a.efi",
            "--pxe",
            place / "tftp",
        )
        peer.export(x86, probe, *targets)
        assert sorted(each.name for each in place.iterdir()) == ["a.efi", "a.img", "a.iso", "tftp"]
        assert filecmp.cmp(place / "a.iso", place / "a.img", shallow=False)
        # Every format keeps times, of seconds at best.
        time.sleep(2.1)
    names = [each.relative_to(tmp_path / "one") for each in (tmp_path / "one").rglob("*") if each.is_file()]
    assert len(names) == 9
    _, different, missing = filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)
    assert (different, missing) == ([], [])
