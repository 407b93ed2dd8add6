"""hostos export: media that boot real machines into an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hostos.cli.common import steps, talk_options
from hostos.cli.completing import images
from hostos.errors import UserError, failure

if TYPE_CHECKING:
    from hostos.export.medium import Medium

_TARGET = click.Path(path_type=Path)


@click.command()
@click.argument("image", metavar="HASH|NAME", shell_complete=images)
@click.option("--iso", type=_TARGET, metavar="FILE", help="A CD image, for BIOS and UEFI.")
@click.option("--usb", type=_TARGET, metavar="FILE", help="The same, to be copied to a USB stick.")
@click.option("--uki", type=_TARGET, metavar="FILE", help="An EFI program with everything in it.")
@click.option("--pxe", type=_TARGET, metavar="DIR", help="A directory for a boot server (iPXE, PXELINUX).")
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
    from hostos.export import medium
    from hostos.export import pxe as server
    from hostos.export import uki as program
    from hostos.machine import os_image
    from hostos.machine.keys import read_public_keys

    writers: list[tuple[Path | None, Callable[[Medium, Path], None]]] = [
        (iso, disc.write),
        (usb, disc.write),
        (uki, program.write),
        (pxe, server.write),
    ]
    targets = [(target, write) for target, write in writers if target is not None]
    if not targets:
        raise UserError("what kind of medium?", "--iso FILE, --usb FILE, --uki FILE or --pxe DIR")
    addresses = tuple(peer for peer in peers if "://" not in peer)
    wanted = live.resolve(image, addresses, tuple(peer for peer in peers if "://" in peer))
    lines = [key.line for name in keys for key in read_public_keys(Path(name))]
    build = os_image.load(Path(os_dir).expanduser() if os_dir else Path("dist/metal-x86_64"))
    if wanted.bundle and wanted.bundle.manifest.architecture not in (build.arch, "any"):
        raise UserError(f"the image is for {wanted.bundle.manifest.architecture}, the OS build for {build.arch}")
    asked = wanted.gateways if wanted.gateways and not addresses else wanted.peers
    made = medium.plan(build, wanted.image, asked, keys=lines, hostname=hostname, append=append)
    for target, write in targets:
        path = target.expanduser().absolute()
        if not path.parent.is_dir():
            raise UserError(f"{path.parent} is not a directory", "name a file in a directory that is there")
        with steps().step(path.name) as step:
            try:
                write(made, path)
            except OSError as error:
                raise failure(f"{path} cannot be written: {error.strerror or error}") from None
            step.detail = f"{sum(each.stat().st_size for each in _files(path)) / 1e6:.1f} MB"


def _files(path: Path) -> list[Path]:
    return [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
