"""`hostos up --root`: joins the machine, the images of this host and the seed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hostos.errors import UserError
from hostos.machine import root

if TYPE_CHECKING:
    from hostos.machine.options import UpOptions


def chosen(options: UpOptions, machine: str, text: str | None, peers: tuple[str, ...]) -> UpOptions:
    """`options` with the image that `text` (a hash, magnet link, CID or name; None: as last time) stands for.

    Raises UserError: malformed, unknown, nobody to ask, or for another architecture.
    """
    from hostos.cli import live
    from hostos.machine.instance import Instance
    from hostos.machine.plan import remembered_options

    if text == root.NONE:
        if peers:
            raise UserError("--peer without --root", "name an image: --root HASH")
        return replace(options, root=text)
    instance = Instance.named(machine)
    remembered = remembered_options(instance) if instance.exists() else None
    if text is None:
        text = remembered.root if remembered else None
        if text in (None, root.NONE):
            raise UserError("--peer without --root", "name an image: --root HASH")
    assert text is not None
    addresses = [peer for peer in peers if "://" not in peer]
    gateways = [peer for peer in peers if "://" in peer]
    wanted = live.resolve(text, tuple(addresses), tuple(gateways))
    own = _architecture(options.over(remembered) if remembered else options)
    if wanted.index is not None:
        wanted = wanted.for_machine(own)
    if wanted.bundle and (image := wanted.bundle.manifest.architecture) not in (own, "any"):
        raise UserError(f"the image is for {image}, this machine is {own}", f"a machine for it: --arch {image}")
    return replace(options, root=wanted.image, peers=(*wanted.peers, *(wanted.gateways if gateways else ())) or None)


def _architecture(options: UpOptions) -> str:
    """Of the machine that these options start. Raises UserError: there is no such OS build."""
    from hostos.machine import os_image

    if options.os is not None:
        return os_image.find(options.os).arch
    return options.arch or os_image.host_arch()


def find(image: str, peers: tuple[str, ...], start: bool) -> root.Source:
    """Who has the image of a machine's root; starts the seed if it is one of this host's (`hostos.machine.root`)."""
    from hostos.cli import live

    wanted = live.resolve(
        image,
        tuple(peer for peer in peers if "://" not in peer),
        tuple(peer for peer in peers if "://" in peer),
    )
    if wanted.gateways:
        return root.Source(wanted.gateways)
    if wanted.bundle is None:
        return root.Source(wanted.peers)
    from hostos.image import seeding

    seed = seeding.ensure_started() if start else seeding.status()
    if start:
        seeding.reload()
    ours = (f"127.0.0.1:{seed.port}",) if seed else ()
    return root.Source((*ours, *wanted.peers), wanted.bundle.to_json())
