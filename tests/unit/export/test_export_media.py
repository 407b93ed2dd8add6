"""Media: what is on them, that the same inputs are the same bytes, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.export import iso, medium, place, pxe, uki
from hostos.export.medium import Medium
from hostos.machine import os_image
from hostos.machine.os_image import OsImage

HASH = "ab" * 32
PEER = "192.0.2.7:6881"
# The beginning of an EFI program, as a kernel with an EFI stub has it.
KERNEL = b"MZ" + bytes(0x3A) + (0x40).to_bytes(4, "little") + b"PE\0\0" + bytes(70_000)


@pytest.fixture
def metal(tmp_path: Path) -> OsImage:
    directory = tmp_path / "metal-x86_64"
    directory.mkdir()
    contents = {"bzImage": KERNEL, "vmlinux": b"elf", "initrd.gz": bytes(200_000), "initrd.cpio": b"cpio"}
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    facts = {
        "kind": "hostos-os", "schema": 1, "profile": "metal", "arch": "x86_64", "kernel_version": "6.12.1",
        "cmdline": "console=ttyS0 console=tty0 quiet", "min_memory_mib": 160, "mounts": ["disk", "9p", "root"],
        "files": {name: {"size": len(data), "sha256": "0" * 64} for name, data in contents.items()},
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(facts))
    return os_image.load(directory)


@pytest.fixture
def made(metal: OsImage) -> Medium:
    return medium.plan(metal, HASH, [PEER], keys=["ssh-ed25519 AAAA me"], hostname="box", append="mem=2G")


def needs(*tools: str, files: tuple[Path, ...] = ()) -> None:
    missing = [tool for tool in tools if not shutil.which(tool)] + [str(file) for file in files if not file.exists()]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (./bootstrap installs them)")


def test_the_command_line_says_everything(made: Medium) -> None:
    words = made.command_line.split()
    assert words[:2] == ["console=ttyS0", "console=tty0"]
    for word in ("rdinit=/usr/lib/hostos/root", f"hostos.root={HASH}", f"hostos.peer={PEER}", "hostos.hostname=box"):
        assert word in words
    assert words[-1] == "mem=2G"


@pytest.mark.parametrize(
    ("peers", "said"),
    [
        ([], "somebody to ask"),
        (["127.0.0.1:6881"], "loopback"),
        ([f"192.0.2.7:{1000 + n}" for n in range(99)], "bytes"),
    ],
)
def test_a_medium_nobody_could_use_is_refused(metal: OsImage, peers: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        medium.plan(metal, HASH, peers)


def test_one_program_holds_kernel_initrd_and_command_line(made: Medium, tmp_path: Path) -> None:
    needs("objcopy", "objdump", files=(uki.STUB,))
    uki.write(made, tmp_path / "one.efi")
    for name, content in ((".cmdline", made.command_line.encode()), (".linux", made.kernel.read_bytes()),
                          (".initrd", made.initrd.read_bytes())):  # fmt: skip
        part = tmp_path / "part"
        subprocess.run(["objcopy", "-O", "binary", f"--only-section={name}", tmp_path / "one.efi", part], check=True)
        # Sections are filled up to the file's alignment.
        assert part.read_bytes().rstrip(b"\0") == content.rstrip(b"\0"), name
    data = (tmp_path / "one.efi").read_bytes()
    (header,) = struct.unpack_from("<I", data, 0x3C)
    assert struct.unpack_from("<I", data, header + 8) == (0,)


def test_a_kernel_without_an_efi_stub_is_told(metal: OsImage, tmp_path: Path) -> None:
    needs("objcopy", "objdump", files=(uki.STUB,))
    (metal.directory / "bzImage").write_bytes(b"MZ" + bytes(len(KERNEL) - 2))
    with pytest.raises(UserError, match="no EFI stub"):
        uki.write(medium.plan(metal, HASH, [PEER]), tmp_path / "one.efi")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metal-x86_64"]


def test_a_place_that_will_not_do_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for target, said in (
        (tmp_path, "is a directory"),
        (Path("/dev/null"), "dd if=FILE of=/dev/null"),
        (tmp_path / "none/file", "is not a directory"),
    ):
        with pytest.raises(UserError) as caught:
            place.check_file(target, 1)
        assert said in str(caught.value)
    with pytest.raises(UserError, match=r"takes 1000000000000 MB in .*, and \d+ MB are free"):
        place.check_file(tmp_path / "big", 1e18)
    for target, said in ((tmp_path / "full/file", "is not a directory"), (tmp_path / "full", "is not empty")):
        with pytest.raises(UserError, match=said):
            place.check_directory(target, 1)
    place.check_file(tmp_path / "full/file", 1)
    place.check_directory(tmp_path / "new", 1)


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("as it was")

    def fail() -> None:
        with place.beside(target) as work:
            (work / "half").write_text("half")
            (work / ("x" * 300)).write_text("more")

    with pytest.raises(UserError, match="cannot be written: File name too long") as caught:
        fail()
    assert caught.value.status == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["as it was"]


def test_a_disc_has_both_ways_to_boot_and_is_the_same_twice(made: Medium, tmp_path: Path) -> None:
    needs("xorriso", "mcopy", "grub-mkimage", files=(iso.GRUB_EFI / "moddep.lst", iso.GRUB / "boot_hybrid.img"))
    iso.write(made, tmp_path / "one.iso")
    # Every format on it keeps times, of seconds at best.
    time.sleep(2.1)
    iso.write(made, tmp_path / "two.iso")
    assert (tmp_path / "one.iso").read_bytes() == (tmp_path / "two.iso").read_bytes()
    shown = subprocess.run(
        ["xorriso", "-indev", tmp_path / "one.iso", "-report_el_torito", "plain", "-report_system_area", "plain"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "BIOS" in shown
    assert "UEFI" in shown
    assert "grub2-mbr" in shown
    assert "GPT" in shown
    # Of a boot image on a CD firmware sees 65535 blocks of 512 bytes at most.
    blocks = [
        int(line.split()[-2]) for line in shown.splitlines() if line.startswith("El Torito boot img") and "UEFI" in line
    ]
    assert len(blocks) == 1
    assert 1000 < blocks[0] < 65535
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metal-x86_64", "one.iso", "two.iso"]


def test_a_boot_server_gets_what_it_serves(made: Medium, tmp_path: Path) -> None:
    needs("grub-mkimage", "objcopy", files=(uki.STUB, iso.GRUB / "pxeboot.img"))
    (tmp_path / "tftp").mkdir()
    pxe.write(made, tmp_path / "tftp")
    assert (tmp_path / "tftp/bzImage").read_bytes() == made.kernel.read_bytes()
    assert made.command_line in (tmp_path / "tftp/hostos.ipxe").read_text()
    assert f" APPEND {made.command_line}\n" in (tmp_path / "tftp/pxelinux.cfg/default").read_text()
    uki.write(made, tmp_path / "one.efi")
    assert (tmp_path / "tftp/hostos.efi").read_bytes() == (tmp_path / "one.efi").read_bytes()
    with pytest.raises(UserError, match="not empty"):
        pxe.write(made, tmp_path / "tftp")
    pxe.write(made, tmp_path / "again")
    for file in ("hostos.0", "hostos.efi"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "tftp" / file).read_bytes()


def test_words_reach_the_kernel_as_they_are(made: Medium) -> None:
    config = iso.grub_config(Medium(made.kernel, made.initrd, 'a=$b c="d;e"', "x"))
    assert """linux /boot/bzImage 'a=$b' 'c="d;e"'\n""" in config
    with pytest.raises(UserError):
        iso.grub_config(Medium(made.kernel, made.initrd, "it's", "x"))
