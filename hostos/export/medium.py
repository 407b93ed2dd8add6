"""What a medium carries: an OS build of the profile `metal`, and the command line that names the image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError
from hostos.machine.kernel_command import COMMAND_LINE_SIZE, encode_key
from hostos.machine.names import check_hostname
from hostos.machine.os_image import OsImage
from hostos.machine.root import ABILITY, FIRST_PROCESS

EPOCH = 315532800
"""Time of everything on a medium, so that the same inputs are the same bytes: 1980-01-01, FAT's first."""
_LOOPBACK = ("127.", "localhost", "[::1]")


@dataclass(frozen=True)
class Medium:
    """Files to boot. `command_line` has no newline; `label`: printable ASCII, for boot loaders' menus."""

    kernel: Path
    initrd: Path
    command_line: str
    label: str

    @property
    def size(self) -> int:
        """Bytes of kernel and initrd."""
        return self.kernel.stat().st_size + self.initrd.stat().st_size


def plan(
    image: OsImage,
    root: str,
    peers: Iterable[str],
    *,
    keys: Iterable[str] = (),
    hostname: str | None = None,
    append: str = "",
) -> Medium:
    """The medium that boots `root` (a hash, or a CID whose `peers` are gateways) with the OS build `image`.

    `keys`: lines of authorized_keys; `append`: more words for the kernel. Raises UserError: the build has no drivers
    for real machines, a peer can only be reached from this host, the command line gets too long.
    """
    if image.by_path is not None or ABILITY not in image.mounts:
        raise UserError(f"{image.directory} cannot boot an image as its root", "invoke build --profile metal")
    if image.arch != "x86_64":
        raise UserError(f"media are made for x86_64, and {image.directory} is for {image.arch}")
    words = [image.cmdline, f"rdinit={FIRST_PROCESS}", f"hostos.root={root}", "fstab=no"]
    named = list(dict.fromkeys(peers))
    if not named:
        raise UserError("a medium needs somebody to ask for the image", "say who has it: --peer HOST:PORT")
    for peer in named:
        host = peer.rpartition("://")[2]
        if host.startswith(_LOOPBACK):
            raise UserError(
                f"peer {peer} is this host's loopback, which no other machine reaches",
                "give the seed an address: hostos seed start --listen ADDRESS; then name it: --peer ADDRESS:PORT",
            )
        words.append(f"hostos.{'gateway' if '://' in peer else 'peer'}={peer}")
    if hostname is not None:
        check_hostname(hostname)
        words.append(f"hostos.hostname={hostname}")
    words += [f"hostos.ssh_key={encode_key(key)}" for key in dict.fromkeys(keys)]
    if append:
        words.append(append)
    line = " ".join(" ".join(words).split())
    # A boot loader adds the initrd's or the kernel's name.
    if len(line.encode()) > COMMAND_LINE_SIZE - 64:
        raise UserError(
            f"the kernel command line gets {len(line.encode())} bytes long, and it can be {COMMAND_LINE_SIZE - 64}",
            "give fewer peers and keys",
        )
    kernel = image.directory / "bzImage"
    initrd = image.directory / "initrd.gz"
    for file in (kernel, initrd):
        if not file.is_file():
            raise UserError(f"{file} is missing", "invoke build --profile metal")
    return Medium(kernel, initrd, line, f"hostos {root[:16]}")
