"""`hostos mirror …`: a package cache that its users share."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import click

from hostos.cli import mirror_snapshot
from hostos.cli.common import json_option, print_json, steps, talk_options
from hostos.errors import FAILED, UserError


@click.group()
def mirror() -> None:
    """Cache the packages that apt and pacman fetch, and share them with peers.

    Every file is checked against the archive's own signatures before it is served, kept or shared, so
    that peers need not be trusted.

    \b
      hostos mirror start                      on 127.0.0.1, for this machine
      sudo hostos mirror enable apt            apt uses it from now on
      hostos mirror start --share 192.168.1.5 --lan      find others, and be found, on the local network
    """


@mirror.command()
@click.option(
    "--listen", multiple=True, metavar="ADDRESS:PORT", help="For clients.  [default: 127.0.0.1 and ::1, 3143]"
)
@click.option("--share", metavar="ADDRESS[:PORT]", help="Serve what is verified to peers there.  [default: not at all]")
@click.option("--peer", "peers", multiple=True, metavar="HOST[:PORT]", help="Ask this peer. May be given often.")
@click.option("--lan/--no-lan", default=None, help="Find peers on the local network, and be found if --share is given.")
@click.option(
    "--dht",
    multiple=True,
    metavar="HOST:PORT",
    help="Join a DHT by this node, to find peers, and be found if --share is given.",
)
@click.option("--cluster-key", metavar="FILE", help="A key that members share; nobody else gets anything.")
@click.option("--size", metavar="SIZE", help="What the cache may hold, e.g. 50G.  [default: 20G]")
@click.option("--keep-days", type=click.IntRange(0), help="Forget what was not used for so long.  [default: 90]")
@click.option("--upload-limit", metavar="RATE", help="To peers, bytes per second, e.g. 2M.")
@click.option("--download-limit", metavar="RATE", help="From mirrors and peers.")
@click.option("--contribute", type=click.IntRange(0, 1000), metavar="N", help="Also fetch and offer N packages a day.")
@click.option(
    "--prefetch/--no-prefetch", default=None, help="Fetch new versions of what is used when an index changes."
)
@click.option("--offline", is_flag=True, help="Serve what is there, ask nobody, say what is missing.")
@json_option
@talk_options
def start(as_json: bool, **options: Any) -> None:
    """Start the cache; returns when it listens. Does nothing if it runs already.

    The first start takes over this machine's own package sources. Settings that are not given here come
    from the configuration file (hostos config list).
    """
    from hostos.mirror import control, enabling, upstreams

    settings = _settings(options)
    talk = steps()
    if upstreams.load() is None:
        _import(talk, replace=True)
    with talk.step("start the mirror") as step:
        info = control.start(settings)
        step.detail = ", ".join(info["listen"])
    if as_json:
        print_json({**_plain(info), "running": True})
        return
    url = control.proxy_url()
    if url:
        click.echo("apt uses it with this line (sudo hostos mirror enable apt writes it):", err=True)
        click.echo(enabling.line("apt", url))
        if any(line.startswith("pacman") for line in info["archives"]):
            click.echo(
                "pacman, with this one, the first of its mirrorlist (sudo hostos mirror enable pacman):", err=True
            )
            click.echo(enabling.line("pacman", url))


def _settings(options: dict[str, Any]) -> Any:
    from hostos import config
    from hostos.cli.swarm import parse_rate
    from hostos.mirror.settings import PEER_PORT, Settings, join_address, parse_address, read_key

    def chosen(option: str, key: str) -> Any:
        return options[option] if options[option] not in (None, ()) else config.get(f"mirror.{key}")

    def switch(option: str) -> bool:
        given = options[option]
        return bool(given) if given is not None else config.get(f"mirror.{option}") == "yes"

    defaults = Settings()
    listen = tuple(chosen("listen", "listen") or ())
    share = chosen("share", "share") or ""
    peers = [join_address(*parse_address(each, "--peer", PEER_PORT)) for each in chosen("peers", "peers") or ()]
    dht = [join_address(*parse_address(each, "--dht")) for each in chosen("dht", "dht") or ()]
    key = chosen("cluster_key", "cluster_key") or ""
    if key:
        key = str(Path(key).expanduser().absolute())
        read_key(key)
    for each in listen:
        parse_address(each.removesuffix(":0") + ":1" if each.endswith(":0") else each, "--listen")
    if share and not share.endswith(":0"):
        share = join_address(*parse_address(share, "--share", PEER_PORT))
    rates = {}
    for name in ("upload_limit", "download_limit"):
        text = chosen(name, name)
        rates[name] = parse_rate(text, f"--{name.replace('_', '-')}") if text else 0
    size = chosen("size", "size")
    keep = chosen("keep_days", "keep_days")
    from hostos.mirror.importing import upstream_proxy

    return Settings(
        listen=listen or defaults.listen,
        share=share,
        peers=tuple(peers),
        lan=switch("lan"),
        dht=tuple(dht),
        cluster_key=key,
        size=parse_size(size) if size else defaults.size,
        keep_days=defaults.keep_days if keep is None else keep,
        offline=options["offline"],
        prefetch=switch("prefetch"),
        contribute=options["contribute"] if options["contribute"] is not None else config.get("mirror.contribute"),
        proxy=upstream_proxy(),
        **rates,
    )


@mirror.command()
def stop() -> None:
    """Stop the cache, if it runs. What is on its way is gone on with after the next start."""
    from hostos.mirror import control

    click.echo("stopped" if control.stop() else "the mirror was not running", err=True)


@mirror.command()
@json_option
def status(as_json: bool) -> None:
    """Where the cache listens, what it holds, whom it knows. Exit code 1 if it does not run."""
    from hostos.mirror import control

    info = control.status()
    if info is None:
        if as_json:
            print_json({"schema": 1, "running": False})
        else:
            click.echo("the mirror is not running: hostos mirror start", err=True)
        raise click.exceptions.Exit(1)
    if as_json:
        print_json({**_plain(info), "running": True})
        return
    mode = "  offline" if info["offline"] else ""
    click.echo(f"listens  {', '.join(info['listen'])}  pid {info['pid']}{mode}")
    click.echo(f"shares   {info['share'] or 'nothing with anybody'}")
    limit = f" of {_bytes(info['limit'])}" if info["limit"] else ""
    click.echo(f"holds    {info['files']} files, {_bytes(info['size'])}{limit}, in {info['store']}")
    click.echo(f"knows    {info['known_files']} signed files; {info['arriving']} on their way")
    if dht := info["dht"]:
        click.echo(f"dht      joined by {', '.join(dht['nodes'])}; {dht['announced']} files announced")
    for line in info["archives"]:
        click.echo(line)
    for peer in info["peers"]:
        state = "lied: not asked any more" if peer["liar"] else peer["reason"] if peer["resting"] else "ready"
        click.echo(f"peer     {peer['address']}  ({peer['found']})  {state}")


@mirror.command()
@json_option
def stats(as_json: bool) -> None:
    """What was asked for and where it came from, by archive and by peer."""
    from hostos.mirror import control

    found = control.stats()
    if as_json:
        print_json({"schema": 1, **found})
        return
    click.echo(f"{'archive':44} {'requests':>8} {'hits':>6} {'refused':>7} {'served':>9} {'mirror':>9} {'peers':>9}")
    for archive, figures in found["archives"].items():
        click.echo(
            f"{archive:44} {figures['requests']:8} {figures['hits']:6} {figures['refused']:7} "
            f"{_bytes(figures['served']):>9} {_bytes(figures['from_mirror']):>9} {_bytes(figures['from_peers']):>9}"
        )
    for peer in found["peers"]:
        lied = "  lied " + time.strftime("%F %T", time.localtime(peer["lied"])) if peer["lied"] else ""
        click.echo(f"peer {peer['address']:39} received {_bytes(peer['received'])}, sent {_bytes(peer['sent'])}{lied}")


@mirror.command("import")
@click.option("--replace", is_flag=True, help="Forget the archives that were there before.")
@talk_options
def import_(replace: bool) -> None:
    """Take over the sources of this machine's apt and pacman as archives to cache.

    They stand in mirror.toml in the configuration directory, which is yours to edit; a running cache
    follows it.
    """
    _import(steps(), replace=replace)


def _import(talk: Any, *, replace: bool) -> None:
    from hostos.mirror import importing, upstreams

    found = importing.import_all()
    before = None if replace else upstreams.load()
    merged = (before or upstreams.Upstreams()).merged(found.upstreams)
    for note in found.notes:
        talk.warning(note)
    if not merged.apt and not merged.pacman:
        raise UserError(
            "this machine has no package sources over http or https",
            f"write some into {upstreams.path()}: docs/mirror.md",
        )
    upstreams.save(merged)
    for line in upstreams.describe(merged):
        talk.note(line)
    talk.note(f"written to {upstreams.path()}")


@mirror.command()
@click.option("--all", "everything", is_flag=True, help="Everything, also what is on its way.")
@click.option("--keep-days", type=click.IntRange(0), help="What was not used for so long.  [default: 90]")
@click.option("--size", metavar="SIZE", help="As much as has to go for the rest to fit.")
@json_option
def prune(everything: bool, keep_days: int | None, size: str | None, as_json: bool) -> None:
    """Remove files from the cache: what was not used for long, what is over a size, or everything."""
    from hostos.mirror import control
    from hostos.mirror.store import Evicted
    from hostos.mirror.upkeep import expire

    limit = parse_size(size) if size else 0
    with control.store() as store:
        if everything:
            gone = store.evict(1 << 62)
            partial = store.remove_partials()
            gone = Evicted(gone.files + partial.files, gone.size + partial.size)
        else:
            store.limit = limit
            gone = expire(store, keep_days if keep_days is not None else (0 if limit else 90))
    if as_json:
        print_json({"schema": 1, "files": gone.files, "bytes": gone.size})
    else:
        click.echo(f"removed {gone.files} files, {_bytes(gone.size)}")


@mirror.command()
@json_option
@talk_options
def verify(as_json: bool) -> None:
    """Read every file of the cache and compare it with its hash; damaged ones are removed (exit code 1)."""
    from hostos.mirror import control

    damaged = []
    count = total = 0
    with control.store() as store, steps().step("verify") as step:
        for sha256, size in store.walk():
            with store.path(sha256).open("rb") as stream:
                good = hashlib.file_digest(stream, "sha256").hexdigest() == sha256
            count += 1
            total += size
            step.progress(f"{count} files, {total >> 20} MiB")
            if not good:
                damaged.append(sha256)
                store.remove(sha256)
        step.detail = f"{count} files, {_bytes(total)}, {len(damaged)} damaged"
    if as_json:
        print_json({"schema": 1, "files": count, "bytes": total, "damaged": damaged})
    for sha256 in damaged:
        click.echo(f"damaged, removed: {sha256}", err=True)
    if damaged:
        raise click.exceptions.Exit(FAILED)


def _root_option(command: Any) -> Any:
    return click.option(
        "--root", type=click.Path(exists=True, file_okay=False, path_type=Path), default="/", help="Of another system."
    )(command)


@mirror.command()
@click.argument("client", type=click.Choice(["apt", "pacman"]))
@_root_option
def enable(client: str, root: Path) -> None:
    """Have apt or pacman use the cache: writes one line into its configuration (as root)."""
    from hostos.mirror import control, enabling

    url = control.proxy_url() or "http://127.0.0.1:3143"
    path, changed = enabling.enable(client, url, root)
    click.echo(f"{path}: {enabling.line(client, url)}" if changed else f"{path}: it was there already", err=True)


@mirror.command()
@click.argument("client", type=click.Choice(["apt", "pacman"]))
@_root_option
def disable(client: str, root: Path) -> None:
    """Take the line out again; nothing else is touched."""
    from hostos.mirror import enabling

    path, changed = enabling.disable(client, root)
    click.echo(f"{path}: taken out" if changed else f"{path}: it was not there", err=True)


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if key != "ok"}


def _bytes(count: int) -> str:
    """For people: powers of 1000, as `apt` counts."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def parse_size(text: str) -> int:
    """Bytes from `500M`, `20G`, `1T` (powers of 1024) or a plain number. Raises UserError."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    digits, shift = (text[:-1], units[text[-1].upper()]) if text and text[-1].upper() in units else (text, 0)
    if not (digits.isascii() and digits.isdigit() and int(digits) > 0 and len(digits) < 16):
        raise UserError(f"--size {text!r} is no size", "e.g. --size 20G")
    return int(digits) << shift


for _more in mirror_snapshot.COMMANDS:
    mirror.add_command(_more)
