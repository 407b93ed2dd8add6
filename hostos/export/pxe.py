"""A directory for a TFTP or HTTP server: everything a machine may ask for that boots from the network.

hostos.0                     BIOS: GRUB, which fetches bzImage and initrd.gz
hostos.efi                   UEFI: all in one
hostos.ipxe                  iPXE, of either
pxelinux.cfg/default         PXELINUX, whose own files are not among them
"""

from __future__ import annotations

import shutil
from pathlib import Path

from hostos.build.run import require, run
from hostos.errors import UserError
from hostos.export import iso, uki
from hostos.export.medium import Medium
from hostos.export.place import beside

COPIES = 2.1
"""How often kernel and initrd lie on the disk."""
_MODULES = ("pxe", "tftp", "linux", "normal", "echo", "serial", "terminal")


def write(medium: Medium, target: Path) -> None:
    """Fill the directory `target`, which is made, or empty; the same inputs give the same bytes. Raises UserError."""
    require("grub-mkimage")
    if not (iso.GRUB / "pxeboot.img").is_file():
        raise UserError(f"{iso.GRUB / 'pxeboot.img'} is not there", "apt-get install grub-pc-bin")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty", "name a new directory")
    with beside(target) as work:
        tree = work / "tree"
        (tree / "pxelinux.cfg").mkdir(parents=True)
        shutil.copyfile(medium.kernel, tree / "bzImage")
        shutil.copyfile(medium.initrd, tree / "initrd.gz")
        uki.write(medium, tree / "hostos.efi")
        # Its menu is in it: it need not ask for one under a dozen names.
        config = work / "grub.cfg"
        config.write_text(iso.grub_config(medium, "(pxe)"))
        run(["grub-mkimage", "-O", "i386-pc-pxe", "-d", iso.GRUB, "-p", "(pxe)", "-c", config, "-o", tree / "hostos.0",
             *_MODULES])  # fmt: skip
        # `initrd=` names it to a kernel started by EFI (Documentation/admin-guide/efi-stub.rst).
        ipxe = f"#!ipxe\nkernel bzImage initrd=initrd.gz {medium.command_line}\ninitrd initrd.gz\nboot\n"
        (tree / "hostos.ipxe").write_text(ipxe)
        lines = (
            "DEFAULT hostos",
            "LABEL hostos",
            " KERNEL bzImage",
            " INITRD initrd.gz",
            f" APPEND {medium.command_line}",
        )
        (tree / "pxelinux.cfg/default").write_text("\n".join(lines) + "\n")
        # Onto an empty directory, too.
        tree.replace(target)
