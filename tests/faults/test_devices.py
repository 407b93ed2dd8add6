"""Disks and shares of real machines: what is kept, what is refused, what a fault does."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.boot, pytest.mark.fault]
STORE = "/var/lib/hostos"


def publish(hostos: Any, place: Path) -> str:
    """An image with one program and 3 MB that do not compress."""
    tree = place / "tree"
    (tree / "usr" / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "usr" / "bin" / "busybox")
    (tree / "data").write_bytes(random.Random(7).randbytes(3_000_000))
    return str(hostos("image", "publish", tree, "--name", "kept").ok().out.strip())


def run_it(hostos: Any, image: str) -> dict[str, Any]:
    """Read all of the image in a container; its figures."""
    done = hostos("container", "boot", "--bare", "--json", image, "--", "/usr/bin/busybox", "sha256sum", "/data").ok()
    assert done.out.split()[0] == hashlib.sha256(random.Random(7).randbytes(3_000_000)).hexdigest()
    report: dict[str, Any] = json.loads(done.err[done.err.index("{") :])
    return report


def test_a_disk_keeps_what_was_fetched_and_grows(hostos: Any, tmp_path: Path) -> None:
    image = publish(hostos, tmp_path)
    try:
        facts = hostos.up("--memory", "384", "--disk", "256M", "--json").json()
        file = hostos.directory() / "disk.img"
        assert (facts["disk"], facts["failed_units"]) == (str(file), [])
        assert file.stat().st_size == 256 << 20
        # Sparse: it has no more than what was written.
        assert file.stat().st_blocks * 512 < 32 << 20
        assert run_it(hostos, image)["fetched"] > 3_000_000
        hostos("ssh", "--", f"echo mine > {STORE}/note; sync").ok()
        second = hostos.up("-m", "second", "--disk", str(file))
        assert second.status == 2
        assert "is in use by machine 'default'" in second.err
        elsewhere = type(hostos)(hostos.home.parent / "elsewhere", hostos.os_dir)
        try:
            locked = elsewhere.up("--disk", str(file))
        finally:
            elsewhere.clean_up()
        assert locked.status == 1
        assert "the disk is in use by another program" in locked.err
        # Killed, not powered off: the journal puts it right.
        hostos("kill").ok()

        smaller = hostos.up("--disk", "128M")
        assert smaller.status == 2
        assert "disks are never shrunk" in smaller.err
        facts = hostos("up", "--disk", "512M", "--json").json()
        assert facts["failed_units"] == []
        assert hostos("ssh", "--", f"cat {STORE}/note").ok().out == "mine\n"
        assert int(hostos("ssh", "--", f"stat -f -c %b {STORE}").ok().out) * 4096 > 400 << 20
        # While it runs, too.
        assert hostos("disk", "grow", "1G").ok().err == "the disk has 1 GiB\n"
        assert int(hostos("ssh", "--", f"stat -f -c %b {STORE}").ok().out) * 4096 > 900 << 20
        assert file.stat().st_size == 1 << 30
        for wrong, says in [("512M", "never shrunk"), ("much", "is not a size")]:
            refused = hostos("disk", "grow", wrong)
            assert refused.status == 2
            assert says in refused.err
        again = run_it(hostos, image)
        assert again["fetched"] == 0, again
        assert hostos("down", "--json").json()["clean"] is True
        # Clean: nothing to be put right.
        assert b"clean" in subprocess.run(["e2fsck", "-n", file], capture_output=True, check=True).stdout
        # Without it, for once and until it is wanted again.
        assert hostos("up", "--disk", "none", "--json").json()["disk"] == ""
        assert file.exists()
    finally:
        hostos("seed", "stop")


def test_what_holds_something_is_never_formatted(hostos: Any, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign, data.img"
    foreign.write_bytes(random.Random(8).randbytes(4 << 20))
    os.truncate(foreign, 128 << 20)
    before = hashlib.sha256(foreign.read_bytes()).digest()
    up = hostos.up("--memory", "256", "--disk", foreign)
    # It comes up, and says what failed.
    assert up.status == 0, up.err
    assert "hostos-devices.service failed in the guest" in up.err
    assert "not touched" in hostos("ssh", "--", "journalctl -u hostos-devices --no-pager").ok().out
    hostos("down").ok()
    assert hashlib.sha256(foreign.read_bytes()).digest() == before


def test_a_disk_of_ones_own_with_a_file_system(hostos: Any, tmp_path: Path) -> None:
    """Made elsewhere, holding something; then the host runs out of room."""
    if os.geteuid() != 0:
        pytest.skip("mounts a small file system: needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", small], check=True)
    try:
        file = small / "disk"
        with file.open("wb") as stream:
            stream.truncate(256 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-E", "root_owner=0:0", file], check=True)
        hostos.up("--memory", "256", "--disk", file).ok()
        hostos("ssh", "--", f"echo kept > {STORE}/note; sync").ok()
        full = hostos("ssh", "--", f"dd if=/dev/urandom of={STORE}/big bs=1M count=100 conv=fsync")
        assert full.status != 0
        # The machine goes on, and can still be powered off.
        assert hostos("ssh", "--", "echo here").ok().out == "here\n"
        assert hostos("status", "--json").json()["state"] == "running"
        hostos("down").ok()
        subprocess.run(["mount", "-o", "remount,size=200m", small], check=True)
        up = hostos("up", "--json").json()
        assert up["failed_units"] == []
        assert hostos("ssh", "--", f"cat {STORE}/note; rm -f {STORE}/big").ok().out == "kept\n"
    finally:
        hostos.clean_up()
        subprocess.run(["umount", "-l", small], check=True)


def test_shares_show_directories_whatever_they_are_called(hostos: Any, tmp_path: Path) -> None:
    odd = tmp_path / "a b, c:d 'é'"
    odd.mkdir()
    (odd / "from host").write_text("hello\n")
    seen = tmp_path / "read only"
    seen.mkdir()
    (seen / "file").write_text("see\n")
    where = "/mnt/x  y "
    facts = hostos.up("--memory", "256", "--share", odd, "--share", f"{seen}:{where}:ro", "--json").json()
    assert facts["failed_units"] == []
    assert facts["shares"] == [f"{odd}:{odd}", f"{seen}:{where}:ro"]
    assert hostos("ssh", "--", "cat", str(odd / "from host"), f"{where}/file").ok().out == "hello\nsee\n"
    hostos("ssh", "--", "sh", "-c", 'echo guest > "$1"; mkdir "$1.d"', "-", str(odd / "new")).ok()
    assert (odd / "new").read_text() == "guest\n"
    assert (odd / "new").stat().st_mode & 0o777 == 0o644
    refused = hostos("ssh", "--", "touch", f"{where}/no")
    assert refused.status != 0
    assert "Read-only file system" in refused.err
    # Nor by mounting it again: the host does not let it.
    assert hostos("ssh", "--", f"mount -o remount,rw '{where}'; touch '{where}/no'").status != 0
    assert not (seen / "no").exists()
    hostos("down").ok()

    # The next start takes them again; one that has gone is an error, and nothing is started.
    shutil.rmtree(seen)
    gone = hostos("up")
    assert gone.status == 2
    assert f"{seen} does not exist" in gone.err
    assert hostos("up", "--share", "none", "--json").json()["shares"] == []


def test_memory_the_guest_frees_comes_back(hostos: Any) -> None:
    hostos.up("--memory", "512", "--reclaim").ok()
    (pid,) = hostos.qemus()

    def resident() -> int:
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) >> 10

    before = resident()
    hostos("ssh", "--", "head -c 150000000 /dev/zero > /tmp/big").ok()
    full = resident()
    assert full > before + 100
    hostos("ssh", "--", "rm /tmp/big").ok()
    # Whole blocks of 4 MiB, in portions, with pauses; what is left in pieces stays.
    give_up = time.monotonic() + 60
    while resident() > full - 50:
        assert time.monotonic() < give_up, (before, full, resident())
        time.sleep(0.5)

    def total_mib() -> int:
        return int(hostos("run", "--", "free", "-m").ok().out.splitlines()[1].split()[3])

    # More than that is taken from it, and given back, while it runs.
    assert hostos("memory", "--json").json()["now_mib"] == 512
    free = total_mib()
    assert hostos("memory", "256").ok().out == "256 of 512 MiB\n"
    assert total_mib() < free - 200
    for wrong, says in (("60", "the OS alone needs"), ("2G", "cannot have more"), ("much", "is not an amount")):
        refused = hostos("memory", wrong)
        assert (refused.status, says in refused.err) == (2, True), refused.err
    assert hostos("memory", "512", "--json").json()["now_mib"] == 512
    assert total_mib() > free - 50
    # What it needs is not taken from it: it keeps what it had.
    hostos("ssh", "--", "head -c 250000000 /dev/zero > /tmp/big").ok()
    hostos.environment["HOSTOS_TIMEOUT_SCALE"] = "0.2"
    failed = hostos("memory", "200")
    assert failed.status == 1
    assert "it has 512 again" in failed.err
    assert hostos("ssh", "--", "rm /tmp/big; echo fine").ok().out == "fine\n"
