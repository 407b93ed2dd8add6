"""Kernel, initrd and command line as one EFI program: a unified kernel image.

Format: https://uapi-group.org/specifications/specs/unified_kernel_image/. The program that starts the kernel is
systemd's stub (systemd-stub(7)); objcopy adds the other parts to it as sections.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from hostos.build.run import require, run
from hostos.errors import UserError, failure
from hostos.export.medium import Medium
from hostos.export.place import beside

STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
COPIES = 1.1
"""How often kernel and initrd lie on the disk while it is made, its other parts included."""
_PAGE = 4096
_SECTION = re.compile(r"^\s*\d+\s+\S+\s+([0-9a-f]{8,16})\s+([0-9a-f]{8,16})\s", re.M)


def write(medium: Medium, target: Path) -> None:
    """Write the EFI program; the same inputs give the same bytes. Raises UserError."""
    require("objcopy", "objdump")
    if not STUB.is_file():
        raise UserError(f"{STUB} is not there", "apt-get install systemd-boot-efi")
    with medium.kernel.open("rb") as kernel:
        if _header(kernel.read(4096)) is None:
            raise UserError(f"UEFI cannot start {medium.kernel}: it has no EFI stub", "build it with the feature uefi")
    with beside(target) as work:
        texts = {".osrel": f'ID=hostos\nPRETTY_NAME="{medium.label}"\n', ".cmdline": medium.command_line}
        parts = []
        for name, text in texts.items():
            file = work / name
            file.write_text(text)
            parts.append((name, file))
        # The kernel last: it may be unpacked in place, beyond its end.
        parts += [(".initrd", medium.initrd), (".linux", medium.kernel)]
        out = work / "out.efi"
        options = [word for option in _sections(parts) for word in option]
        run(["objcopy", *options, STUB, out])
        _forget_time(out)
        out.replace(target)


def _sections(parts: list[tuple[str, Path]]) -> Iterator[tuple[str, str, str, str]]:
    """objcopy's options: each part behind the one before, at the addresses the stub looks for them."""
    found = _SECTION.findall(run(["objdump", "-h", STUB]))
    if not found:
        raise failure(f"{STUB} has no sections objdump knows")
    address = max(int(size, 16) + int(start, 16) for size, start in found)
    for name, file in parts:
        address = -(-address // _PAGE) * _PAGE
        yield "--add-section", f"{name}={file}", "--change-section-vma", f"{name}={address:#x}"
        address += file.stat().st_size


def _header(start: bytes) -> int | None:
    """Where an EFI program's PE header begins, given its first bytes; None if it is no such program."""
    if start[:2] != b"MZ" or len(start) < 0x40:
        return None
    (header,) = struct.unpack_from("<I", start, 0x3C)
    return int(header) if start[header : header + 4] == b"PE\0\0" else None


def _forget_time(program: Path) -> None:
    """Zero the time in the PE header, which objcopy takes from the clock; and the checksum, which firmware
    does not look at (https://learn.microsoft.com/windows/win32/debug/pe-format)."""
    with program.open("r+b") as file:
        header = _header(file.read(4096))
        if header is None:
            raise failure(f"{STUB} is no EFI program")
        for place in (header + 8, header + 24 + 64):
            file.seek(place)
            file.write(bytes(4))
