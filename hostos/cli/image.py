"""`hostos image …`: make images and look at them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from hostos.cli import image_build, image_capture, image_keep, image_layers, image_look
from hostos.cli.common import human_size, steps
from hostos.cli.completing import images
from hostos.cli.name import push
from hostos.errors import UserError


def trace_options(command: Any) -> Any:
    """What `publish` and `trace` have in common."""
    for option in (
        click.option("-m", "--machine", default="default", show_default=True, metavar="NAME", help="Where to boot it."),
        click.option("--seconds", type=click.FloatRange(1, 3600), default=60.0, show_default=True,
                     help="How long a command is watched that doesn't end."),
        click.option("--save", type=click.Path(path_type=Path), metavar="FILE",
                     help="Write the recording there: with it the image can be made again without booting."),
    ):  # fmt: skip
        command = option(command)
    return command


def api_option(command: Any) -> Any:
    return click.option("--ipfs-api", metavar="URL", help="Where the IPFS node's RPC API is.  "
                        "[default: http://127.0.0.1:5001]")(command)  # fmt: skip


@click.group()
def image() -> None:
    """Make container images from trees, and look after those of this host."""


@image.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="What to call it, e.g. web/debian-13.")
@click.option("--from", "parent", metavar="IMAGE", shell_complete=images,
              help="Make it a child of IMAGE: only what differs is stored.")  # fmt: skip
@click.option("--changes", is_flag=True, help="SOURCE is not the whole tree but the upper directory of an overlay.")
@click.option("--command", default="", metavar="WORDS", help="What to run; default: the image's init.")
@click.option("--env", multiple=True, metavar="KEY=VALUE", help="Environment variable (repeatable).")
@click.option("--user", default="", metavar="USER[:GROUP]", help="Who runs it; default: root.")
@click.option("--workdir", default="", metavar="PATH", help="Where it runs; default: /.")
@click.option("--port", "ports", multiple=True, metavar="N[/udp]", help="Port it listens on (repeatable).")
@click.option("--arch", default=None, help="Architecture, if no program in the tree tells it.")
@click.option("--piece-size", type=int, metavar="KIB", help="Unit of transfer.  [default: 64, more above 1 GiB]")
@click.option("--trace", "traces", multiple=True, metavar="COMMAND",
              help="Boot it with COMMAND; pack first what it reads. Repeatable; '': its own command.")  # fmt: skip
@click.option(
    "--recording", type=click.Path(path_type=Path), metavar="FILE", help="Pack in the order recorded in FILE."
)
@click.option("--private", is_flag=True, help="Encrypt it: only who has its link (hostos image link) can read it.")
@click.option("--ipfs", is_flag=True, help="Also add it to an IPFS node, and print its CID after the hash.")
@api_option
@trace_options
def publish(
    source: Path,
    name: str,
    parent: str | None,
    changes: bool,
    command: str,
    env: tuple[str, ...],
    user: str,
    workdir: str,
    ports: tuple[str, ...],
    arch: str | None,
    piece_size: int | None,
    traces: tuple[str, ...],
    recording: Path | None,
    private: bool,
    ipfs: bool,
    ipfs_api: str | None,
    save: Path | None,
    seconds: float,
    machine: str,
) -> None:
    """Make an image of SOURCE (a directory, a tar archive or a squashfs file) and print its hash.

    It goes into the store of this host. Nobody is told; `hostos seed start` offers it.

    \b
    With --trace it is booted once in a machine, and then starts with fewer and earlier blocks:
      hostos image publish rootfs.tar --name web --trace "python3 -c pass" --trace "nginx -t"
    With --from the image inherits another one's layers, which are neither packed nor stored again:
      hostos image publish ./tree --name web/mine --from web
    """
    from hostos.image import ipfs as adding
    from hostos.image import publish as publishing
    from hostos.image import seeding
    from hostos.image.recording import Recording
    from hostos.image.store import Store

    if recording and traces:
        raise UserError("--trace and --recording exclude each other", "leave one of them out")
    if save and not traces:
        raise UserError("--save needs a --trace to save", "add --trace COMMAND")
    if ipfs or ipfs_api:
        # Before minutes are spent on packing.
        adding.check(ipfs_api or adding.DEFAULT_API)

    boot = publishing.boot_config(command=command, env=env, user=user, workdir=workdir, ports=ports)
    if parent:
        from hostos.cli.image_layers import publish_from

        if traces or recording or arch:
            raise UserError(
                "--from excludes --trace, --recording and --arch", "trace it afterwards: hostos image trace"
            )
        given = boot if command or env or user or workdir or ports else None
        size = piece_size * 1024 if piece_size is not None else None
        made = publish_from(source, name, parent, given, changes, size, steps())
        if ipfs or ipfs_api:
            click.echo(adding.add(Store(), Store().get(made), ipfs_api or adding.DEFAULT_API, steps()))
        return
    if changes:
        raise UserError("--changes needs the image that was changed", "add --from IMAGE")
    how = _how(traces, seconds, machine) if traces else None
    told = steps()
    recorded = Recording.read(recording) if recording else None
    size = piece_size * 1024 if piece_size is not None else None
    before = {item.hash for item in Store().images()}
    result = publishing.publish(source, name, told, boot=boot, architecture=arch, piece_size=size, recording=recorded)
    made = result.hash
    if how:
        from hostos.cli import tracing

        store, made = Store(), ""
        try:
            made = tracing.traced(store, store.get(result.hash), how, None, save, told)
        finally:
            # Only the traced image was asked for.
            if result.hash not in {*before, made}:
                store.remove(result.hash)
    if private:
        from hostos.image import privacy

        plain = made
        store = Store()
        try:
            made = privacy.encrypt(store, store.get(plain), told)
        finally:
            # Nor was the plain one, nor may it be seeded.
            if plain not in before:
                store.remove(plain)
    seeded = seeding.reload()
    click.echo(made)
    after = "seeding it already" if seeded else "offer it with: hostos seed start"
    click.echo(
        f"{name}: {human_size(Store().get(made).manifest.size)}, {result.packed.architecture}; {after}", err=True
    )
    if private:
        click.echo(f"private: hostos image link {name} prints the link with its key", err=True)
    if ipfs or ipfs_api:
        click.echo(adding.add(Store(), Store().get(made), ipfs_api or adding.DEFAULT_API, told))


@image.command()
@click.argument("reference", metavar="HASH|NAME", shell_complete=images)
@click.option("--peer", "peers", multiple=True, metavar="ADDR:PORT", help="Who has it. Repeatable.  "
              "[default: this host's seed, if it runs]")  # fmt: skip
@click.option("--web-seed", "web_seeds", multiple=True, metavar="URL", help="A web server that has it. Repeatable.")
def link(reference: str, peers: tuple[str, ...], web_seeds: tuple[str, ...]) -> None:
    """Print the link to an image; of a private one with its key, so mind who sees it.

    \b
      hostos image link web/secret --peer 192.0.2.7:6881 > secret.link
      hostos container boot @secret.link
    """
    from hostos.cli import links
    from hostos.image import seeding
    from hostos.image.store import Store
    from hostos.live.torrents import parse_peer, parse_web_seed

    store = Store()
    found = store.get(reference)
    seed = seeding.status()
    asked = tuple(parse_peer(peer) for peer in peers) or ((seed.address,) if seed else ())
    click.echo(links.link(found, asked, tuple(str(parse_web_seed(url)) for url in web_seeds)))


@image.command(name="ipfs")
@click.argument("reference", metavar="HASH|NAME")
@api_option
def add_to_ipfs(reference: str, ipfs_api: str | None) -> None:
    """Add an image of this host to an IPFS node, pinned there, and print its CID.

    `hostos container boot CID` then boots it from any gateway of that node.
    """
    from hostos.image import ipfs as adding
    from hostos.image.store import Store

    api = ipfs_api or adding.DEFAULT_API
    store = Store()
    found = store.get(reference)
    adding.check(api)
    click.echo(adding.add(store, found, api, steps()))


@image.command()
@click.argument("reference", metavar="HASH|NAME", shell_complete=images)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--url", metavar="URL", help="Where DIRECTORY will be found; then the link to the image is printed.")
def export(reference: str, directory: Path, url: str | None) -> None:
    """Write an image into DIRECTORY, from where any web server that knows ranges can serve it.

    Several images may share a directory. Nobody has to trust the server: all is verified against the hash.

    \b
      hostos image export web/debian /srv/www/hostos --url https://example.org/hostos
      hostos container boot HASH --web-seed https://example.org/hostos
    """
    from hostos.image import exporting
    from hostos.image.store import Store
    from hostos.live.torrents import parse_web_seed

    address = str(parse_web_seed(url)) if url else ""
    store = Store()
    found = store.get(reference)
    written = exporting.export(store, found, directory, steps())
    if address:
        click.echo(store.bundle(found.hash).torrent.magnet(web_seeds=(address,)))
    click.echo(f"{found.name}: {human_size(written)} written; boot it with --web-seed {address or 'URL'}", err=True)


@image.command()
@click.argument("name")
@click.argument("references", metavar="HASH|NAME...", nargs=-1, required=True, shell_complete=images)
def index(name: str, references: tuple[str, ...]) -> None:
    """Join images of several architectures under one hash, called NAME, and print it.

    Whoever boots that hash gets the image for their machine. The images stay what they are.

    \b
      hostos image publish amd64.tar --name web/debian-amd64
      hostos image publish arm64.tar --name web/debian-arm64
      hostos image index web/debian web/debian-amd64 web/debian-arm64
    """
    from hostos.image import indexes, seeding
    from hostos.image.store import Store
    from hostos.live.manifest import check_name

    made = indexes.publish(Store(), check_name(name), references)
    seeded = seeding.reload()
    click.echo(made.hash)
    after = "seeding it already" if seeded else "offer it with: hostos seed start"
    click.echo(f"{name}: {', '.join(sorted(made.index.images))}; {after}", err=True)


@image.command()
@click.argument("reference", metavar="HASH|NAME")
@click.argument("command", metavar="[-- COMMAND…]", nargs=-1, type=click.UNPROCESSED)
@click.option("--also", "others", multiple=True, metavar="COMMAND", help="One more workload (repeatable; '' as above).")
@click.option("--recording", type=click.Path(path_type=Path), metavar="FILE",
              help="Boot nothing: take what was recorded in FILE.")  # fmt: skip
@click.option("--replace", is_flag=True, help="Remove the image without the trace.")
@click.option("--root", is_flag=True, help="Boot it as `hostos up --root` does, in a machine made for that.")
@trace_options
def trace(
    reference: str,
    command: tuple[str, ...],
    others: tuple[str, ...],
    root: bool,
    recording: Path | None,
    replace: bool,
    save: Path | None,
    seconds: float,
    machine: str,
) -> None:
    """Boot an image, pack it again in the order in which it reads its files, and print the new hash.

    Without COMMAND it boots what the image says, or its init. The new image carries the order (its
    boot trace), so whoever boots it fetches those blocks before they are asked for. This runs in the
    machine and needs no root on this host.

    \b
      hostos image trace web/debian -- python3 -c pass
      hostos image trace web/debian --also "nginx -t" --save boot.json
      hostos image trace web/system --root
    """
    from hostos.cli import tracing
    from hostos.image import seeding
    from hostos.image.store import Store

    if recording and (command or others or save or root):
        raise UserError("--recording excludes a command, --also, --root and --save", "leave them out")
    if root and command:
        raise UserError("as a machine's system an image boots its init", "leave the command out, or: --also COMMAND")
    store = Store()
    found = store.get(reference)
    if any(layer.cipher for layer in found.manifest.layers):
        raise UserError(
            f"image {found.name} is encrypted: it can't be sorted any more",
            "trace it while it is published: hostos image publish … --private --trace COMMAND",
        )
    how = None
    if not recording:
        how = _how(others, seconds, machine)
        how = tracing.How((() if root else (tuple(command),)) + how.commands, seconds, machine, root)
    made = tracing.traced(store, found, how, recording, save, steps())
    sizes = f"{human_size(found.manifest.size)} -> {human_size(store.get(made).manifest.size)}"
    if replace and made != found.hash:
        store.remove(found.hash)
    seeding.reload()
    click.echo(made)
    left = "" if replace or made == found.hash else f"; the image without it is still there: {found.hash[:16]}"
    click.echo(f"{found.name}: {sizes}{left}", err=True)


def _how(commands: tuple[str, ...], seconds: float, machine: str) -> Any:
    from hostos.cli.tracing import How

    try:
        return How(tuple(tuple(shlex.split(text)) for text in commands), seconds, machine)
    except ValueError as error:
        raise UserError(f"a command to trace: {error}", "quote it as for a shell") from None


for _noun in (image_look, image_layers, image_build, image_capture, image_keep):
    for _more in _noun.COMMANDS:
        image.add_command(_more)
image.add_command(push)
