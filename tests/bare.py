"""Bare machines: QEMU with firmware, a network card and a medium. No -kernel, no archive, nothing of the launcher."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from hostos.machine.options import timeout_scale

OVMF = (Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd"))
SECONDS = 240.0
"""For one boot, by emulation, on a host that does other things, too."""

PROBE = """#!/bin/busybox sh
# A system that says what machine it runs on, over the serial line, and powers it off.
say() { echo "probe: $*" > /dev/ttyS0; }
say command line: $(busybox cat /proc/cmdline)
for card in /sys/class/net/*/device; do say card: $(busybox readlink -f $card/driver); done
for disk in /sys/block/[hsvn]*; do say disk: $(busybox readlink -f $disk) $(busybox cat $disk/device/model); done
[ -d /sys/firmware/efi ] && say firmware: UEFI || say firmware: BIOS
say root: $(busybox head -n 1 /proc/mounts)
busybox poweroff -f
"""


def make_probe(tree: Path) -> Path:
    """A directory to publish as an image: `PROBE` is its init."""
    busybox = shutil.which("busybox")
    if not busybox or b"/ld-linux" in Path(busybox).read_bytes():
        pytest.skip("a statically linked busybox is not installed")
    for name in ("bin", "sbin"):
        (tree / name).mkdir(parents=True)
    shutil.copy(busybox, tree / "bin/busybox")
    (tree / "sbin/init").write_text(PROBE)
    (tree / "sbin/init").chmod(0o755)
    return tree


@dataclass
class Bare:
    """`firmware`: BIOS or UEFI; `medium`: a file, seen by the machine as a `disk`: cd, ahci, nvme, usb or virtio;
    without one it boots from the network. `net`: QEMU's -netdev."""

    place: Path
    firmware: str
    medium: Path | None = None
    disk: str = "cd"
    card: str = "virtio-net-pci"
    net: str = "user"
    inside: tuple[str, ...] = ()
    """Words before QEMU's: the network namespace it is in."""

    @property
    def log(self) -> Path:
        return self.place / "serial.log"

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def start(self) -> subprocess.Popen[bytes]:
        """Switch it on."""
        return subprocess.Popen([*self.inside, *self._command()], stdin=subprocess.DEVNULL)

    def run(self) -> dict[str, list[str]]:
        """Boot a probe and wait until the machine is off; what it said: {"card": […], …}."""
        with self.start() as machine:
            try:
                status = machine.wait(SECONDS * timeout_scale())
            except subprocess.TimeoutExpired:
                pytest.fail(f"not done in {SECONDS} s: {self.text()[-3000:]}")
            finally:
                machine.kill()
        assert status == 0, self.text()
        said: dict[str, list[str]] = {}
        for name, value in re.findall(r"^probe: ([a-z ]+): (.*?)\r?$", self.text(), re.M):
            said.setdefault(name, []).append(value)
        assert "root" in said, self.text()[-3000:]
        return said

    def _command(self) -> list[str]:
        words = ["qemu-system-x86_64", "-machine", "q35", "-cpu", "max", "-smp", "2", "-m", "1024", "-nodefaults"]
        words += ["-no-reboot", "-display", "none", "-vga", "std", "-serial", f"file:{self.log}"]
        if self.firmware == "UEFI":
            if not OVMF[0].is_file():
                pytest.skip("needs UEFI firmware for QEMU (apt-get install ovmf)")
            variables = self.place / "vars.fd"
            shutil.copyfile(OVMF[1], variables)
            words += ["-drive", f"if=pflash,format=raw,readonly=on,file={OVMF[0]}"]
            words += ["-drive", f"if=pflash,format=raw,file={variables}"]
        card = f"{self.card},netdev=net"
        if self.medium is None:
            # UEFI has a driver of its own; of the BIOS it is the card's ROM that boots.
            card += ",bootindex=1" + (",romfile=" if self.firmware == "UEFI" else "")
        else:
            # Of what is written to it nothing stays: the medium is the same for the next test.
            access = "media=cdrom,readonly=on" if self.disk == "cd" else "snapshot=on"
            words += ["-drive", f"if=none,id=medium,format=raw,{access},file={self.medium}"]
            words += {
                "cd": ["-device", "ide-cd,drive=medium,bootindex=1"],
                "ahci": ["-device", "ide-hd,drive=medium,bootindex=1"],
                "nvme": ["-device", "nvme,drive=medium,serial=1,bootindex=1"],
                "usb": ["-device", "qemu-xhci", "-device", "usb-storage,drive=medium,bootindex=1"],
                "virtio": ["-device", "virtio-blk-pci,drive=medium,bootindex=1"],
            }[self.disk]
            card += ",romfile="
        return [*words, "-netdev", f"{self.net},id=net", "-device", card]


def wait_for_login(machine: subprocess.Popen[bytes], bare: Bare, key: Path, command: str) -> tuple[str, float]:
    """What `command` prints in it over SSH, and how many seconds after this call. `bare.net` forwards port 22."""
    began = time.monotonic()
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=20", "BatchMode=yes"]
    words = ["ssh", "-i", str(key), *(word for each in options for word in ("-o", each))]
    while True:
        assert machine.poll() is None, bare.text()
        assert time.monotonic() < began + SECONDS * timeout_scale(), bare.text()[-3000:]
        if port := _port(machine.pid):
            login = [*words, "-p", str(port), "root@127.0.0.1", command]
            done = subprocess.run(login, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return done.stdout, time.monotonic() - began
        time.sleep(1)


def _port(pid: int) -> int:
    """Where QEMU listens for the guest's sshd (port 0 on its command line: any)."""
    listening = psutil.CONN_LISTEN
    found = [each.laddr.port for each in psutil.Process(pid).net_connections("tcp4") if each.status == listening]
    return int(found[0]) if found else 0
