"""Machines whose own system is an image: a real Debian from a real seed, in QEMU; and media that do the same.

HOSTOS_TEST_SYSTEM names another tar archive of a system than the quick start's (systemd and openssh-server in it).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostos.machine.options import timeout_scale
from hostos.quickstart import demonstration_image
from hostos.steps import Steps

pytestmark = [pytest.mark.boot, pytest.mark.fault, pytest.mark.timeout(3600)]
REPOSITORY = Path(__file__).parents[2]
OVMF = (Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd"))
# Fetched by nothing that a boot does.
COLD = "usr/share/i18n/locales/POSIX", "usr/bin/perl"
MEDIUM_SECONDS = 240.0


@pytest.fixture(scope="module")
def archive() -> Path:
    named = os.environ.get("HOSTOS_TEST_SYSTEM")
    return Path(named) if named else demonstration_image(Steps())


@pytest.fixture(scope="module")
def image(session_hostos: Any, archive: Path) -> Iterator[str]:
    yield session_hostos("image", "publish", archive, "--name", "test/system").ok().out.strip()
    session_hostos("kill")
    session_hostos("seed", "stop")


def up(hostos: Any, *words: str) -> Any:
    """`hostos up`: a whole Debian starts, each of its blocks fetched as it is read."""
    return hostos("up", "--os", hostos.os_dir, *words, timeout=1500)


def said(hostos: Any, *words: str) -> str:
    return str(hostos("ssh", "--", *words).ok().out.strip())


def cold_file(archive: Path) -> tuple[str, str]:
    """A file of the image that nobody reads at boot, and its SHA-256."""
    with tarfile.open(archive) as tar:
        names = {member.name.removeprefix("./"): member for member in tar if member.isfile()}
        name = next(name for name in (*COLD, *names) if name in names and names[name].size > 1000)
        data = tar.extractfile(names[name])
        assert data is not None
        return f"/{name}", hashlib.sha256(data.read()).hexdigest()


def test_an_image_is_the_machines_system(session_hostos: Any, image: str, archive: Path) -> None:
    hostos = session_hostos
    facts = up(hostos, "--root", "test/system", "--json").json()
    assert facts["root"] == image
    assert facts["failed_units"] == []
    stages = [stage["name"] for stage in facts["stages"]]
    assert stages.index("image found") < stages.index("root mounted") < stages.index("SSH answers")
    assert said(hostos, "cat", "/proc/1/comm") == "systemd"
    assert said(hostos, "hostname") == "default"
    assert "overlay" in said(hostos, "cat", "/proc/mounts").splitlines()[0]
    assert said(hostos, "systemctl", "is-system-running") == "running"
    # The client lives below; the image sees neither it nor its mounts, and can ask it.
    assert "squashfs" not in said(hostos, "cat", "/proc/mounts")
    figures = json.loads(hostos("container", "stats", "root", "--json").ok().out)
    assert 0 < figures["fetched"] < figures["size"]
    refused = hostos("container", "boot", "test/system", "--", "true")
    assert refused.status == 2
    assert "as its root" in refused.err
    said(hostos, "touch", "/root/changed")

    # The seed dies; who reads waits, and goes on when it is back.
    path, digest = cold_file(archive)
    hostos("seed", "stop").ok()
    reader = hostos.start("ssh", "--", "sha256sum", path)
    time.sleep(5 * timeout_scale())
    assert reader.poll() is None, reader.communicate()
    hostos("seed", "start").ok()
    out, err = reader.communicate(timeout=120 * timeout_scale())
    assert out.split()[:1] == [digest.encode()], err

    assert hostos("down", "--json").json()["clean"]


def test_changes_are_gone_unless_they_are_kept(session_hostos: Any, image: str) -> None:
    hostos = session_hostos
    up(hostos, "--root", image, "--disk", "1G", "--persist").ok()
    # What the machine before has written was in memory; if that test was left out, there was nothing either.
    assert hostos("ssh", "--", "test", "-e", "/root/changed").status == 1
    identity = said(hostos, "cat", "/etc/machine-id")
    said(hostos, "echo mine > /root/kept; dpkg-divert --list > /dev/null; rm /etc/os-release")
    assert hostos("down", "--json").json()["clean"]
    # As last time, without a word.
    assert hostos("run", "--", "cat", "/root/kept", timeout=1500).ok().out == "mine\n"
    assert hostos("ssh", "--", "test", "-e", "/etc/os-release").status == 1
    assert said(hostos, "cat", "/etc/machine-id") == identity
    hostos("kill").ok()


def test_an_image_that_is_no_system_is_refused(hostos: Any, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "usr/bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "usr/bin/busybox")
    hostos("image", "publish", tree, "--name", "no-init").ok()
    failed = hostos.up("--root", "no-init")
    assert failed.status == 1
    assert "the image has no init to boot" in failed.err
    assert hostos.qemus() == []
    (tree / "sbin").mkdir()
    shutil.copy("/bin/busybox", tree / "sbin/init")
    hostos("image", "publish", tree, "--name", "no-sshd").ok()
    failed = hostos.up("--root", "no-sshd")
    assert failed.status == 1
    assert "no SSH server" in failed.err


def test_nobody_has_it(hostos: Any) -> None:
    hostos.environment["HOSTOS_TIMEOUT_SCALE"] = str(timeout_scale())
    missing = "ab" * 32
    failed = hostos.up("--root", missing, "--peer", "127.0.0.1:9", "--append", "hostos.deadline=5")
    assert failed.status == 1
    assert "nobody had image" in failed.err
    assert "10.0.2.2:9" in failed.err
    assert hostos.qemus() == []
    assert hostos.up("--root", missing).status == 2
    assert hostos.up("--root", missing, "--peer", "127.0.0.1:9", "--persist").status == 2


@pytest.fixture(scope="module")
def metal() -> Path:
    directory = Path(os.environ.get("HOSTOS_TEST_METAL", REPOSITORY / "dist" / "metal-x86_64"))
    if not (directory / "manifest.json").is_file():
        pytest.skip("needs the OS for real machines (invoke build --profile metal)")
    return directory


@pytest.mark.parametrize(("firmware", "card"), [("BIOS", "e1000e"), ("UEFI", "igb")])
def test_a_medium_boots_a_machine(
    session_hostos: Any, image: str, metal: Path, tmp_path: Path, firmware: str, card: str
) -> None:
    """With nothing but the medium: no -kernel, no archive, no virtio."""
    hostos = session_hostos
    if firmware == "UEFI" and not OVMF[0].is_file():
        pytest.skip("needs UEFI firmware for QEMU (apt-get install ovmf)")
    shown = subprocess.run(["qemu-system-x86_64", "-device", "help"], capture_output=True, text=True, check=True).stdout
    if f'"{card}"' not in shown:
        card = "e1000e"
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    port = json.loads(hostos("seed", "start", "--json").ok().out)["port"]
    # This host, as user networking calls it.
    words = ("--os", metal, "--peer", f"10.0.2.2:{port}", "--key", f"{key}.pub", "--hostname", "bare", "--usb")
    hostos("export", image, *words, tmp_path / "medium.img").ok()
    log = tmp_path / "serial.log"
    with subprocess.Popen(_qemu(firmware, card, tmp_path), stdin=subprocess.DEVNULL) as machine:
        try:
            until = time.monotonic() + MEDIUM_SECONDS * timeout_scale()
            while True:
                text = log.read_text(errors="replace") if log.exists() else ""
                assert machine.poll() is None, text
                assert time.monotonic() < until, text[-3000:]
                login = ["ssh", "-i", str(key), "-p", str(_port(machine.pid)), "-o", "StrictHostKeyChecking=no",
                         "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=20", "-o", "BatchMode=yes",
                         "root@127.0.0.1", "hostname; cat /proc/1/comm /sys/class/net/eth0/device/uevent"]  # fmt: skip
                done = subprocess.run(login, capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    break
                time.sleep(2)
            assert done.stdout.splitlines()[:2] == ["bare", "systemd"]
            assert f"DRIVER={card}" in done.stdout
        finally:
            machine.send_signal(signal.SIGKILL)


def _qemu(firmware: str, card: str, place: Path) -> list[str]:
    variables = place / "vars.fd"
    pflash = []
    if firmware == "UEFI":
        shutil.copyfile(OVMF[1], variables)
        pflash = [
            "-drive", f"if=pflash,format=raw,readonly=on,file={OVMF[0]}",
            "-drive", f"if=pflash,format=raw,file={variables}",
        ]  # fmt: skip
    return [
        "qemu-system-x86_64", "-machine", "q35", "-cpu", "max", "-smp", "2", "-m", "1024", "-nodefaults",
        "-display", "none", "-vga", "std", *pflash,
        "-device", "qemu-xhci", "-drive", f"if=none,id=stick,format=raw,readonly=on,file={place / 'medium.img'}",
        "-device", "usb-storage,drive=stick,bootindex=1",
        "-netdev", "user,id=net0,hostfwd=tcp:127.0.0.1:0-:22", "-device", f"{card},netdev=net0,romfile=",
        "-serial", f"file:{place / 'serial.log'}",
    ]  # fmt: skip


def _port(pid: int) -> int:
    """Where QEMU listens for the guest's sshd (port 0 on its command line: any)."""
    import psutil

    found = [
        each.laddr.port for each in psutil.Process(pid).net_connections("tcp4") if each.status == psutil.CONN_LISTEN
    ]
    return int(found[0]) if found else 9
