"""Machines whose own system is an image: a real Debian from a real seed, in QEMU."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostos.machine.options import timeout_scale

pytestmark = [pytest.mark.boot, pytest.mark.fault, pytest.mark.timeout(3600)]
# Fetched by nothing that a boot does.
COLD = "usr/share/i18n/locales/POSIX", "usr/bin/perl"


@pytest.fixture(scope="module")
def image(session_hostos: Any, system: str) -> Iterator[str]:
    yield system
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


def test_it_powers_off_in_time_without_its_peer(session_hostos: Any, image: str) -> None:
    hostos = session_hostos
    up(hostos, "--root", image).ok()
    # What that takes is fetched by then (docs/root.md).
    time.sleep(35 * timeout_scale())
    hostos("seed", "stop").ok()
    began = time.monotonic()
    done = hostos("down", "--json", timeout=300).json()
    hostos("seed", "start").ok()
    assert done["clean"]
    assert time.monotonic() - began < 60 * timeout_scale()


def test_a_suspended_machine_goes_on_reading(session_hostos: Any, image: str, archive: Path) -> None:
    hostos = session_hostos
    up(hostos, "--root", image).ok()
    said(hostos, "echo here > /run/note; touch /root/note")
    hostos("suspend").ok()
    assert hostos.qemus() == []
    assert "state loaded" in hostos("up", timeout=600).ok().err
    assert said(hostos, "cat", "/run/note") == "here"
    path, digest = cold_file(archive)
    assert said(hostos, "sha256sum", path).split()[0] == digest
    assert hostos("down", "--json").json()["clean"]


# Each takes every network card it finds, as a careless image's does.
MANAGERS = """
name = "test/managers"
from = "test/system"
[[step]]
packages = ["ifupdown", "dhcpcd-base", "network-manager", "udev"]
[[step]]
run = [
  "printf '[Match]\\nName=*\\n[Network]\\nDHCP=yes\\n' > /etc/systemd/network/05-all.network",
  "printf 'auto eth0\\niface eth0 inet dhcp\\n' >> /etc/network/interfaces",
  "systemctl enable systemd-networkd networking NetworkManager",
]
"""


@pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="packages come from a mirror: needs mmdebstrap")
def test_it_survives_the_images_own_network_managers(
    session_hostos: Any, image: str, archive: Path, tmp_path: Path
) -> None:
    """systemd-networkd, NetworkManager and ifupdown, each of which would take the card the root comes over."""
    hostos = session_hostos
    (tmp_path / "managers.toml").write_text(MANAGERS)
    hostos("image", "build", tmp_path / "managers.toml", timeout=1200).ok()
    hostos("kill")  # what an attempt before this one left
    up(hostos, "--root", "test/managers").ok()
    address = said(hostos, "ip -4 -o addr show eth0; ip route show default")
    assert "10.0.2.15/" in address
    for service in ("systemd-networkd", "NetworkManager", "networking"):
        said(hostos, f"systemctl is-active {service} && systemctl restart {service}")
        # It is up, does not manage the card, and the card has what it had.
        assert said(hostos, "systemctl", "is-active", service) == "active"
        assert said(hostos, "ip -4 -o addr show eth0; ip route show default") == address
    assert "unmanaged" in said(hostos, "nmcli -t -f DEVICE,STATE device | grep eth0")
    assert "already configured" in said(hostos, "ifup eth0 2>&1")
    said(hostos, "networkctl reload; networkctl reconfigure eth0; udevadm trigger -c add /sys/class/net/eth0")
    time.sleep(5)
    assert said(hostos, "ip -4 -o addr show eth0; ip route show default") == address
    path, digest = cold_file(archive)
    assert said(hostos, "sha256sum", path).split()[0] == digest
    # Its daemons stop before its file systems are written back: the root must be there to the end.
    assert hostos("down", "--json").json()["clean"]


def test_an_image_for_another_architecture_is_refused(session_hostos: Any, hostos: Any, tmp_path: Path) -> None:
    """By the host, which has it and changes nothing; else by the machine, once it has seen what it is."""
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin/init").write_text("#!/bin/sh\n")
    foreign = "x86_64" if hostos.arch == "aarch64" else "aarch64"
    words = ("image", "publish", tmp_path, "--name", "other", "--arch", foreign)
    other = session_hostos(*words).ok().out.strip()
    refused = session_hostos("up", "-m", "foreign", "--os", hostos.os_dir, "--root", other)
    assert refused.status == 2
    assert f"the image is for {foreign}, this machine is {hostos.arch}" in refused.err
    assert not session_hostos.directory("foreign").exists()
    port = session_hostos("seed", "start", "--json").json()["port"]
    failed = hostos.up("--root", other, "--peer", f"127.0.0.1:{port}")
    session_hostos("seed", "stop")
    assert failed.status == 1
    assert f"the image is for {foreign}, this machine is {hostos.arch}" in failed.err
    assert hostos.qemus() == []
