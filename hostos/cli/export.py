"""hostos export: media that boot real machines into an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hostos.cli.common import steps, talk_options
from hostos.cli.completing import images
from hostos.errors import UserError

if TYPE_CHECKING:
    from hostos.export.medium import Medium
    from hostos.machine.os_image import OsImage

_TARGET = click.Path(path_type=Path)
_METAL = Path("dist/metal-x86_64")


@dataclass(frozen=True)
class _Kind:
    """How a medium is written, and its place looked at before; `copies` of kernel and initrd lie there meanwhile."""

    write: Callable[[Medium, Path], None]
    check: Callable[[Path, float], None]
    copies: float


@click.command()
@click.argument("image", metavar="HASH|NAME", shell_complete=images)
@click.option("--iso", type=_TARGET, metavar="FILE", help="A CD image, for BIOS and UEFI.")
@click.option("--usb", type=_TARGET, metavar="FILE", help="The same, to be copied to a USB stick.")
@click.option("--uki", type=_TARGET, metavar="FILE", help="An EFI program with everything in it.")
@click.option("--pxe", type=_TARGET, metavar="DIR", help="A directory for a boot server: BIOS, UEFI, iPXE.")
@click.option("--peer", "peers", multiple=True, metavar="ADDR:PORT", help="Who has the image. Repeatable.")
@click.option("--key", "keys", multiple=True, metavar="PUB", help="SSH public key file to let in. Repeatable.")
@click.option("--hostname", metavar="NAME", help="Host name.  [default: hostos]")
@click.option("--append", default="", metavar="WORDS", help="More words for the kernel's command line.")
@click.option("--os", "os_dir", metavar="DIR", help="OS build.  [default: ./dist/metal-x86_64]")
@talk_options
def export(
    image: str,
    iso: Path | None,
    usb: Path | None,
    uki: Path | None,
    pxe: Path | None,
    peers: tuple[str, ...],
    keys: tuple[str, ...],
    hostname: str | None,
    append: str,
    os_dir: str | None,
) -> None:
    """Write a medium that boots a real machine into IMAGE, straight from the network.

    It holds kernel, initrd and command line; the image comes from the peers it names. Build the kernel for
    real machines once, then write as many media as you like:

    \b
      invoke build --profile metal
      hostos seed start --listen 192.0.2.7:6881
      hostos export web/debian --peer 192.0.2.7:6881 --key ~/.ssh/id_ed25519.pub --usb debian.img
      dd if=debian.img of=/dev/sdX bs=4M conv=fsync
    """
    from hostos.cli import live
    from hostos.export import iso as disc
    from hostos.export import medium, place
    from hostos.export import pxe as server
    from hostos.export import uki as program
    from hostos.machine.keys import read_public_keys

    disc_kind = _Kind(disc.write, place.check_file, disc.COPIES)
    kinds = (
        (iso, disc_kind),
        (usb, disc_kind),
        (uki, _Kind(program.write, place.check_file, program.COPIES)),
        (pxe, _Kind(server.write, place.check_directory, server.COPIES)),
    )
    targets = [(target.expanduser().absolute(), kind) for target, kind in kinds if target is not None]
    if not targets:
        raise UserError("what kind of medium?", "--iso FILE, --usb FILE, --uki FILE or --pxe DIR")
    build = _os_build(os_dir)
    addresses = tuple(peer for peer in peers if "://" not in peer)
    wanted = live.resolve(image, addresses, tuple(peer for peer in peers if "://" in peer))
    if wanted.index is not None:
        wanted = wanted.for_machine(build.arch)
    if wanted.bundle and wanted.bundle.manifest.architecture not in (build.arch, "any"):
        raise UserError(
            f"the image is for {wanted.bundle.manifest.architecture}, the OS build {build.directory} for {build.arch}",
            "name an OS build for it: --os DIRECTORY",
        )
    lines = [key.line for name in keys for key in read_public_keys(Path(name))]
    asked = wanted.gateways if wanted.gateways and not addresses else wanted.peers
    made = medium.plan(build, wanted.image, asked, keys=lines, hostname=hostname, append=append)
    if len({target for target, _ in targets}) < len(targets):
        raise UserError("two media cannot be one file", "give each a name of its own")
    for target, kind in targets:
        kind.check(target, kind.copies * made.size)
    for target, kind in targets:
        with steps().step(target.name) as step:
            kind.write(made, target)
            step.detail = f"{sum(each.stat().st_size for each in _files(target)) / 1e6:.1f} MB"


def _os_build(directory: str | None) -> OsImage:
    """Raises UserError: there is none."""
    from hostos.machine import os_image

    if directory is None and not _METAL.is_dir():
        raise UserError(
            f"there is no OS build for real machines: {_METAL} is missing",
            "build it: invoke build --profile metal   (for virtual machines, any will do: --os dist/default-x86_64)",
        )
    return os_image.load(Path(directory).expanduser() if directory else _METAL)


def _files(path: Path) -> list[Path]:
    return [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
