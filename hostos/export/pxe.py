"""A directory for a TFTP or HTTP server: kernel, initrd, and what iPXE and PXELINUX are to do with them."""

from __future__ import annotations

import shutil
from pathlib import Path

from hostos.errors import UserError
from hostos.export.medium import Medium


def write(medium: Medium, target: Path) -> None:
    """Fill the directory `target`, which is made, or empty. Raises UserError, OSError."""
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty", "name a new directory")
    target.mkdir(exist_ok=True)
    (target / "pxelinux.cfg").mkdir()
    shutil.copyfile(medium.kernel, target / "bzImage")
    shutil.copyfile(medium.initrd, target / "initrd.gz")
    # `initrd=` names it to a kernel started by EFI (Documentation/admin-guide/efi-stub.rst).
    ipxe = f"#!ipxe\nkernel bzImage initrd=initrd.gz {medium.command_line}\ninitrd initrd.gz\nboot\n"
    (target / "hostos.ipxe").write_text(ipxe)
    lines = ("DEFAULT hostos", "LABEL hostos", " KERNEL bzImage", " INITRD initrd.gz", f" APPEND {medium.command_line}")
    (target / "pxelinux.cfg/default").write_text("\n".join(lines) + "\n")
