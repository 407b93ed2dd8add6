"""Disks and shares: what is understood, what is refused, what QEMU and the guest are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.machine import devices, disk, share
from hostos.machine.disk import Disk, parse_size, plan_disk, prepare
from hostos.machine.options import UpOptions
from hostos.machine.share import Share, check_shares, parse_share


@pytest.mark.parametrize(
    ("text", "size"),
    [("20G", 20 << 30), ("512m", 512 << 20), ("1TiB", 1 << 40), ("100MB", 100 << 20), ("67108864", 64 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "1.5G", "20 G", "-1G", "./20G", "20Gx", "disk"])
def test_no_sizes(text: str) -> None:
    assert parse_size(text) is None


def test_its_own_disk_is_made_grown_and_never_shrunk(tmp_path: Path) -> None:
    planned = plan_disk("64M", tmp_path)
    assert planned == Disk(tmp_path / "disk.img", grow_to=64 << 20, format=True)
    # A plan changes nothing.
    assert not planned.file.exists()
    prepare(planned)
    assert planned.file.stat().st_size == 64 << 20
    assert planned.file.stat().st_mode & 0o777 == 0o600
    planned.file.write_bytes(b"kept")
    os.truncate(planned.file, 64 << 20)
    bigger = plan_disk("128M", tmp_path)
    assert bigger is not None
    prepare(bigger)
    assert planned.file.stat().st_size == 128 << 20
    assert planned.file.read_bytes()[:4] == b"kept"
    with pytest.raises(UserError, match="never shrunk") as caught:
        plan_disk("64M", tmp_path)
    assert caught.value.hint.startswith("--disk 128M or more")
    assert plan_disk("none", tmp_path) is None


@pytest.mark.parametrize("text", ["1M", "0", "17T", "999999999999T"])
def test_impossible_sizes(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not possible"):
        plan_disk(text, tmp_path)


def test_files_of_the_users(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(UserError, match="does not exist") as caught:
        plan_disk(str(file), tmp_path)
    assert f"truncate -s 20G {file}" in caught.value.hint
    file.touch()
    os.truncate(file, 1 << 20)
    with pytest.raises(UserError, match="too small: 1 MiB"):
        plan_disk(str(file), tmp_path)
    os.truncate(file, 64 << 20)
    # Nothing was ever written to it: a file system may be made.
    assert plan_disk(str(file), tmp_path) == Disk(file, format=True)
    with file.open("r+b") as stream:
        stream.seek(32 << 20)
        stream.write(b"x")
    assert plan_disk(str(file), tmp_path) == Disk(file, format=False)
    with pytest.raises(UserError, match="is a directory"):
        plan_disk(str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="cannot be used|not a plain file"):
        plan_disk("/dev/null", tmp_path)
    image = tmp_path / "image.qcow2"
    image.write_bytes(b"raw!")
    with pytest.raises(UserError, match="called qcow2 and isn't"):
        plan_disk(str(image), tmp_path)
    image.write_bytes(b"QFI\xfb")
    assert plan_disk(str(image), tmp_path) == Disk(image, "qcow2")


def test_a_guest_cannot_turn_a_raw_disk_into_another_format(tmp_path: Path) -> None:
    """A qcow2 header written by the guest could name any file of the host as its backing file."""
    file = tmp_path / "disk"
    file.write_bytes(b"QFI\xfb")
    os.truncate(file, 64 << 20)
    planned = plan_disk(str(file), tmp_path)
    assert planned is not None
    assert planned.kind == "raw"
    assert "driver=raw,node-name=disk" in disk.options(planned)[0][1]


def test_what_qemu_is_told() -> None:
    assert disk.options(Disk(Path("/a,b"))) == [
        ["-blockdev", ("driver=raw,node-name=disk,discard=unmap,detect-zeroes=unmap,file.driver=file,"
         "file.filename=/a,,b,file.discard=unmap")],
        ["-device", "virtio-blk-pci,drive=disk,serial=hostos-disk,werror=report,rerror=report"],
    ]  # fmt: skip
    (fsdev, device, *_) = share.options((Share(Path("/a,b"), "/mnt", True), Share(Path("/c"), "/c")))
    assert fsdev == ["-fsdev", "local,id=share0,path=/a,,b,security_model=none,readonly=on,multidevs=remap"]
    assert device == ["-device", "virtio-9p-pci,fsdev=share0,mount_tag=hostos0"]


def test_root_lets_no_guest_make_files_of_the_hosts_root(monkeypatch: pytest.MonkeyPatch) -> None:
    writable = (Share(Path("/a"), "/a"),)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "security_model=mapped-xattr," in share.options(writable)[0][1]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "security_model=none," in share.options(writable)[0][1]


def test_what_the_guest_is_told() -> None:
    shares = (Share(Path("/a"), "/mnt/x  y "), Share(Path("/b"), "/b", True))
    told = devices.lines(Disk(Path("/d"), format=True), shares)
    assert told == "disk hostos-disk format\n9p hostos0 rw /mnt/x  y \n9p hostos1 ro /b\n"
    assert devices.lines(Disk(Path("/d")), ()) == "disk hostos-disk keep\n"
    assert devices.lines(None, ()) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a", Share(Path("/a"), "/a")),
        ("/a:ro", Share(Path("/a"), "/a", True)),
        ("/a:rw", Share(Path("/a"), "/a")),
        ("/a:/b", Share(Path("/a"), "/b")),
        ("/a:/b:ro", Share(Path("/a"), "/b", True)),
        ("/a b:/c d/:ro", Share(Path("/a b"), "/c d", True)),
        ("/a:b:/c", Share(Path("/a:b"), "/c")),
        ("/a:/b/../c//d", Share(Path("/a"), "/c/d")),
        ("/a:/root/src", Share(Path("/a"), "/root/src")),
    ],
)
def test_shares(text: str, expected: Share) -> None:
    assert parse_share(text) == expected


def test_shares_are_remembered_as_they_were_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x:").mkdir()
    (tmp_path / "x:" / "y").mkdir()
    # A directory with a colon in its name that exists is that directory.
    assert parse_share("x:/y") == Share(tmp_path / "x:" / "y", str(tmp_path / "x:" / "y"))
    assert parse_share(".") == Share(tmp_path, str(tmp_path))
    options = UpOptions(shares=("/a:/b:ro",), disk="20G", reclaim=True)
    assert UpOptions.from_json(options.to_json()) == options
    assert UpOptions(shares=("none",)).over(options).shared == ()


@given(host=st.from_regex(r"/[a-z]{1,3}( [:,'é]{1,2})?", fullmatch=True), read_only=st.booleans())
def test_a_share_written_is_read(host: str, read_only: bool) -> None:
    given = Share(Path(host).absolute(), "/mnt/a b", read_only)
    assert parse_share(str(given)) == given


@pytest.mark.parametrize(
    "guest", ["/", "/etc", "/usr/lib", "/lib64", "/run/x", "/proc", "/var/lib/hostos", "/x/../etc", "/root", "/tmp/"]
)
def test_what_would_cover_the_guests_system(guest: str) -> None:
    with pytest.raises(UserError, match="would cover"):
        parse_share(f"/a:{guest}")


def test_no_line_breaks_into_the_guest() -> None:
    with pytest.raises(UserError, match="no place in the guest"):
        parse_share("/a:/b\ndisk x format")


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for shares, says in [
        ((Share(tmp_path / "none", "/a"),), "does not exist"),
        ((Share(file, "/a"),), "is not a directory"),
        ((Share(tmp_path, "/a"), Share(tmp_path, "/a")), "two shares are to be /a"),
    ]:
        with pytest.raises(UserError, match=says):
            check_shares(shares)
    check_shares((Share(tmp_path, "/a"), Share(tmp_path, "/b", True)))
