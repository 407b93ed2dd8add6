"""Kernel, initrd and command line as one EFI program: a unified kernel image.

Format: https://uapi-group.org/specifications/specs/unified_kernel_image/. The program that starts the kernel is
systemd's stub (systemd-stub(7)); objcopy adds the other parts to it as sections.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hostos.build.run import require, run
from hostos.errors import UserError, failure
from hostos.export.medium import Medium

STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
_PAGE = 4096
_SECTION = re.compile(r"^\s*\d+\s+\S+\s+([0-9a-f]{8,16})\s+([0-9a-f]{8,16})\s", re.M)


def write(medium: Medium, target: Path) -> None:
    """Write the EFI program; the same inputs give the same bytes. Raises UserError."""
    require("objcopy", "objdump")
    if not STUB.is_file():
        raise UserError(f"{STUB} is not there", "apt-get install systemd-boot-efi")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".uki-") as work:
        texts = {".osrel": f'ID=hostos\nPRETTY_NAME="{medium.label}"\n', ".cmdline": medium.command_line}
        parts = []
        for name, text in texts.items():
            file = Path(work) / name
            file.write_text(text)
            parts.append((name, file))
        # The kernel last: it may be unpacked in place, beyond its end.
        parts += [(".initrd", medium.initrd), (".linux", medium.kernel)]
        out = Path(work) / "out.efi"
        options = [word for option in _sections(parts) for word in option]
        run(["objcopy", *options, STUB, out])
        data = bytearray(out.read_bytes())
        _forget_time(data)
        target.write_bytes(data)


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


def _forget_time(data: bytearray) -> None:
    """Zero the time in the PE header, which objcopy takes from the clock; and the checksum, which firmware
    does not look at (https://learn.microsoft.com/windows/win32/debug/pe-format)."""
    (header,) = struct.unpack_from("<I", data, 0x3C)
    if data[header : header + 4] != b"PE\0\0":
        raise failure(f"{STUB} is no EFI program")
    struct.pack_into("<I", data, header + 8, 0)
    struct.pack_into("<I", data, header + 24 + 64, 0)
