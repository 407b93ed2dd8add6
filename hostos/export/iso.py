"""One file that boots from a CD and, copied to it, from a USB stick; under BIOS and under UEFI.

    ISO 9660: bzImage, initrd.gz, grub.cfg, GRUB's image     <- BIOS, from a CD (El Torito) or a stick (the boot sector)
    FAT, appended: EFI/BOOT/BOOTX64.EFI, GRUB once more      <- UEFI, from either

What grub-mkrescue does, without what it adds of its own; everything is made in files, nothing is mounted. Kernel and
initrd are not in the FAT file system: of a CD's boot image firmware sees 32 MiB at most (El Torito counts in 16 bits).
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from hostos.build.run import require, run
from hostos.errors import UserError
from hostos.export.medium import EPOCH, Medium
from hostos.export.place import beside

GRUB = Path("/usr/lib/grub/i386-pc")
GRUB_EFI = Path("/usr/lib/grub/x86_64-efi")
_MODULES = ("iso9660", "part_msdos", "part_gpt", "linux", "normal", "configfile", "search", "search_label", "echo",
            "serial", "terminal")  # fmt: skip
LABEL = "HOSTOS"
COPIES = 2.2
"""How often kernel and initrd lie on the disk while a medium is made: in its tree, and in the file."""
_MIB = 1 << 20
# FAT's own tables, and some room.
_ROOM = 2 * _MIB
_EARLY = f"""search --no-floppy --label {LABEL} --set root
set prefix=($root)/boot/grub
configfile ($root)/boot/grub/grub.cfg
"""


def write(medium: Medium, target: Path) -> None:
    """Write the medium; the same inputs give the same bytes. Raises UserError."""
    require("xorriso", "grub-mkimage", "mformat", "mcopy", "mmd")
    for file in (GRUB / "boot_hybrid.img", GRUB / "cdboot.img", GRUB_EFI / "moddep.lst"):
        if not file.is_file():
            raise UserError(f"{file} is not there", "apt-get install grub-pc-bin grub-efi-amd64-bin")
    with beside(target) as work:
        tree = work / "tree"
        (tree / "boot/grub").mkdir(parents=True)
        shutil.copyfile(medium.kernel, tree / "boot/bzImage")
        shutil.copyfile(medium.initrd, tree / "boot/initrd.gz")
        (tree / "boot/grub/grub.cfg").write_text(grub_config(medium))
        early = work / "early.cfg"
        early.write_text(_EARLY)
        loader, program = tree / "boot/grub/bios.img", work / "BOOTX64.EFI"
        for kind, directory, out, module in (
            ("i386-pc-eltorito", GRUB, loader, "biosdisk"),
            # The screen that the firmware has set up is passed on to the kernel.
            ("x86_64-efi", GRUB_EFI, program, "efi_gop"),
        ):
            mine: list[str | Path] = ["-O", kind, "-d", directory, "-p", "/boot/grub", "-c", early, "-o", out]
            run(["grub-mkimage", *mine, module, *_MODULES])
        esp = _efi_partition(program, work)
        # Of what is on it: no two media are taken for each other, and the same one is the same.
        identity = _identity(medium)
        guid = f"{identity[:8]}-{identity[8:12]}-4{identity[13:16]}-8{identity[17:20]}-{identity[20:32]}"
        file = work / "out.iso"
        run(
            [
                "xorriso", "-as", "mkisofs", "-quiet", "-r", "-V", LABEL, "-o", file,
                "--modification-date=1980010100000000", "--set_all_file_dates", "1980010100000000",
                "--gpt_disk_guid", guid,
                "--grub2-mbr", GRUB / "boot_hybrid.img",
                "-b", "boot/grub/bios.img", "-c", "boot/grub/boot.cat", "-no-emul-boot", "-boot-load-size", "4",
                "-boot-info-table", "--grub2-boot-info",
                "-append_partition", "2", "0xef", esp, "-appended_part_as_gpt",
                "-eltorito-alt-boot", "-e", "--interval:appended_partition_2:all::", "-no-emul-boot",
                tree,
            ],
            env=_TIME,
        )  # fmt: skip
        file.replace(target)


_TIME = {"SOURCE_DATE_EPOCH": str(EPOCH), "TZ": "UTC"}


def grub_config(medium: Medium, place: str = "/boot") -> str:
    """GRUB's menu of one entry, started at once; the files are in `place`. It talks on the serial line, too."""
    # Inside single quotes GRUB takes everything as it is; there is no way to write one.
    if "'" in medium.command_line:
        raise UserError("the kernel command line of a medium cannot have a ' in it")
    words = " ".join(f"'{word}'" for word in medium.command_line.split())
    return f"""serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
echo '{medium.label}'
linux {place}/bzImage {words}
initrd {place}/initrd.gz
boot
"""


def _identity(medium: Medium) -> str:
    digest = hashlib.sha256(medium.command_line.encode())
    for file in (medium.kernel, medium.initrd):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _efi_partition(program: Path, work: Path) -> Path:
    """A FAT file system with the program that UEFI starts of a removable medium."""
    esp = work / "esp.img"
    size = -(-(program.stat().st_size + _ROOM) // _MIB)
    run(["mformat", "-C", "-i", esp, "-N", "484f5354", "-T", str(size * _MIB // 512), "::"], env=_TIME)
    run(["mmd", "-i", esp, "::/EFI", "::/EFI/BOOT"], env=_TIME)
    # -m: the time of the file, which is the medium's.
    run(["touch", "--date", f"@{EPOCH}", program], env=_TIME)
    run(["mcopy", "-m", "-i", esp, program, "::/EFI/BOOT/BOOTX64.EFI"], env=_TIME)
    return esp
