"""hostos container: boot images from their hashes and look after what runs.

Heavy imports happen in the commands: `--help` must not pay for them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hostos.cli.common import json_option, machine_option, steps, talk_options
from hostos.cli.completing import images
from hostos.cli.links import read_link
from hostos.cli.swarm import swarm_options, swarm_settings
from hostos.errors import UserError


class BootCommand(click.Command):
    """`… [--nspawn OPT…] [-- COMMAND…]`: what follows these two words is not ours to interpret."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ours, command = split_at(args, "--")
        ours, nspawn = split_at(ours, "--nspawn")
        nspawn = [word.removeprefix("--nspawn=") for word in ours if word.startswith("--nspawn=")] + nspawn
        rest = super().parse_args(ctx, [word for word in ours if not word.startswith("--nspawn=")])
        ctx.params |= {"command": tuple(command), "nspawn": tuple(nspawn)}
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("After the options"):
            formatter.write_dl(
                [
                    ("--nspawn OPT…", "Options for systemd-nspawn, up to `--`."),
                    ("-- COMMAND…", "Run this and nothing else; without it, what the image says, or its init."),
                ]
            )


def split_at(words: Sequence[str], mark: str) -> tuple[list[str], list[str]]:
    """What is before the first `mark` and what is after it."""
    if mark not in words:
        return list(words), []
    index = list(words).index(mark)
    return list(words[:index]), list(words[index + 1 :])


@click.group()
def container() -> None:
    """Run containers straight from the peer-to-peer network."""


@container.command(cls=BootCommand)
@click.argument("image", shell_complete=images)
@machine_option
@click.option("--name", help="Name of the container.  [default: after the image]")
@click.option("--peer", "peers", multiple=True, metavar="ADDR:PORT", help="Who has the image. Repeatable.")
@click.option("--gateway", "gateways", multiple=True, metavar="URL",
              help="For a CID: who has it. Repeatable.  [default: http://127.0.0.1:8080]")  # fmt: skip
@click.option("--web-seed", "web_seeds", multiple=True, metavar="URL",
              help="A plain web server that has the image (hostos image export). Repeatable.")  # fmt: skip
@click.option("--bind", "binds", multiple=True, metavar="PATH[:TO][:ro]", help="Show a path of the guest. Repeatable.")
@click.option("--network", type=click.Choice(["nat", "none", "host"]), default="nat", show_default=True,
              help="Its own, from where it can connect out; none; or the machine's.")  # fmt: skip
@click.option("--publish", "publish", multiple=True, metavar="[ADDR:]HOST:PORT",
              help="PORT of the container on this host, 127.0.0.1 unless ADDR says otherwise. Repeatable.")  # fmt: skip
@click.option("--read-only", is_flag=True, help="The container can't change its root.")
@click.option("--size", "--tmpfs-size", default="50%", show_default=True, metavar="SIZE",
              help="Memory its changes may take.")  # fmt: skip
@click.option("--persist", default="", metavar="NAME",
              help="Keep its changes as NAME for the next boot of the image with it: on the machine's disk, or "
              "while the machine runs.")  # fmt: skip
@click.option("--memory", default="", metavar="SIZE", help="Memory it may take, its changes included, e.g. 512m.")
@click.option("--cpus", default="", metavar="N", help="Processors' worth of time it may take, e.g. 0.5.")
@click.option("--pids", default="", metavar="N", help="Processes and threads it may have.")
@click.option("--init", is_flag=True, help="Boot the image's init even if it names a command.")
@click.option("--tty/--no-tty", default=None, help="Whether it gets a terminal.  [default: if stdin and stdout are]")
@click.option("--deadline", type=click.FloatRange(1, 3600), default=30.0, show_default=True, metavar="SECONDS",
              help="For finding the image and its first blocks.")  # fmt: skip
@click.option("--read-deadline", type=click.FloatRange(1, 86400), default=120.0, show_default=True, metavar="SECONDS",
              help="For each later read.")  # fmt: skip
@click.option("--on-loss", type=click.Choice(["fail", "stop", "wait"]), default="fail", show_default=True,
              help="When nobody has what it reads: that read fails, it is stopped, or it waits.")  # fmt: skip
@click.option("--wait", type=click.FloatRange(0, 3600), default=120.0, show_default=True, metavar="SECONDS",
              help="For its init to say that it is up.")  # fmt: skip
@click.option("--complete", default="", metavar="off|on|RATE",
              help="Fetch the rest of the image, too, while idle (RATE: at most e.g. 2M a second).")  # fmt: skip
@click.option("--download-limit", metavar="RATE", help="Bytes a second, e.g. 500K or 2M.  [default: none]")
@swarm_options
@click.option("--bare", is_flag=True, help="Give the guest nothing but the hash, as another host would.")
@click.option("--no-up", is_flag=True, help="Don't start the machine if it isn't running.")
@json_option
@talk_options
def boot(
    image: str,
    machine: str,
    name: str | None,
    peers: tuple[str, ...],
    gateways: tuple[str, ...],
    web_seeds: tuple[str, ...],
    binds: tuple[str, ...],
    network: str,
    publish: tuple[str, ...],
    read_only: bool,
    size: str,
    persist: str,
    memory: str,
    cpus: str,
    pids: str,
    init: bool,
    tty: bool | None,
    deadline: float,
    read_deadline: float,
    on_loss: str,
    wait: float,
    complete: str,
    download_limit: str | None,
    lan: bool,
    public: bool,
    upload_limit: str | None,
    encryption: str | None,
    bare: bool,
    no_up: bool,
    as_json: bool,
    command: tuple[str, ...],
    nspawn: tuple[str, ...],
) -> int:
    """Boot IMAGE: a hash, a magnet link, an IPFS CID, or the name of an image of this host; or @FILE, which holds
    a link (@-: standard input).

    \b
    With a command it runs that, with this terminal, and ends with its exit status:
      hostos container boot 7aecf24720… -- python3 -c 'print(1)'
    Without one it boots the image's init in the background:
      hostos container boot 7aecf24720… && hostos container shell NAME
    """
    from hostos import config
    from hostos.cli import live, publishing
    from hostos.live.cid import looks_like_cid
    from hostos.live.container import Options, parse_bind
    from hostos.live.limits import Limits
    from hostos.live.private import key_to_text
    from hostos.live.published import Port
    from hostos.live.schedule import Rest

    if init and command:
        raise UserError("--init and a command exclude each other", "leave one of them out")
    # Everything that can be wrong on this side is found before anything is started.
    image, key = read_link(image)
    if looks_like_cid(image):
        gateways = gateways or tuple(config.get("container.gateways") or ())
    else:
        peers = peers or tuple(config.get("container.peers") or ())
        web_seeds = web_seeds or tuple(config.get("container.web_seeds") or ())
    swarm = swarm_settings(
        lan=lan,
        public=public,
        encryption=encryption,
        upload_limit=upload_limit or config.get("swarm.upload_limit"),
        download_limit=download_limit or config.get("swarm.download_limit"),
    )
    wanted = live.resolve(image, peers, gateways, web_seeds, discovers=swarm.discovers)
    forwards = publishing.parse(publish)
    Options(
        publish=tuple(Port(0, forward.guest_port) for forward in forwards),
        network=network,  # type: ignore[arg-type]
        name=name or "new",
        command=command,
        binds=tuple(parse_bind(bind) for bind in binds),
        nspawn=nspawn,
        upper_size=size,
        limits=Limits.parse(memory, cpus, pids),
        persist=persist,
    )
    if complete:
        Rest.parse(complete)
    if tty is None:
        tty = sys.stdin.isatty() and sys.stdout.isatty()
    if (wanted.bundle or wanted.index) and not no_up:
        wanted = wanted.for_machine(live.architecture(machine))
    told = steps()
    with live.guest(machine, told, start=not no_up) as guest:
        if root := guest.instance.require_run().root:
            raise UserError(
                f"machine {machine!r} has image {root[:16]}… as its root: it runs no containers of hostos",
                "in another machine: hostos container boot -m NAME; or: hostos up --root none",
            )
        wanted = wanted.for_machine(guest.instance.require_run().architecture)
        where = live.peers_and_bundle(wanted, guest.instance, bare=bare, swarm=swarm)
        secret = key_to_text(key) if (key := key or live.own_key(wanted)) else None
        if wanted.bundle:
            own_command = bool(wanted.bundle.manifest.boot.command)
        elif command or init:
            own_command = False
        else:
            answer = guest.ask("inspect", within=deadline, deadline=deadline, **where)
            own_command = bool(json.loads(answer["manifest"])["boot"].get("command"))
        attached = bool(command) or (own_command and not init)
        prepared = guest.ask(
            "prepare",
            within=2 * deadline,
            name=name,
            command=list(command),
            init=not attached,
            console="read-only" if not attached else "interactive" if tty else "pipe",
            binds=list(binds),
            nspawn=list(nspawn),
            network=network,
            publish=publishing.asked(forwards, guest.instance),
            read_only=read_only,
            upper_size=size,
            persist=persist,
            memory=memory,
            cpus=cpus,
            pids=pids,
            deadline=deadline,
            read_deadline=read_deadline,
            on_loss=on_loss,
            hold=attached,
            complete=complete or None,
            key=secret,
            **where,
        )
        made = str(prepared["name"])
        for warning in prepared.get("warnings", ()):
            told.warning(warning)
        if attached:
            with publishing.published(guest.instance, forwards, prepared["published"], keep=False):
                return _run_attached(guest, made, prepared["argv"], tty=tty, as_json=as_json)
        with publishing.published(guest.instance, forwards, prepared["published"], keep=True):
            pass
        ready = guest.ask("start", within=wait, name=made, ready_within=wait)["ready"]
        figures = guest.ask("stats", name=made)
        seconds = _since_start()
        if as_json:
            click.echo(json.dumps({**figures, "ready": ready, "ready_seconds": round(seconds, 3)}, indent=2))
        else:
            click.echo(made)
        up = "is up" if ready else "runs, but its init has not said that it is up"
        live.say(f"container {made} {up} after {seconds:.2f} s{_of_which(guest)}; {live.fetched(figures)}")
        return 0


def _run_attached(guest: Any, name: str, argv: list[str], *, tty: bool, as_json: bool) -> int:
    from hostos.cli import live

    first: list[float] = []
    status: int = guest.interact(argv, tty=tty, first_output=lambda: first.append(_since_start()))
    figures = guest.ask("release", within=60.0, name=name)
    if figures["lost"]:
        live.say(f"warning: container {name} was stopped: {figures['lost']}")
    if as_json:
        seconds = round(first[0], 3) if first else None
        started = round(guest.started, 3)
        report = {**figures, "status": status, "first_output_seconds": seconds, "machine_start_seconds": started}
        live.say(json.dumps(report))
    elif not tty or sys.stderr.isatty():
        when = f"first output after {first[0]:.2f} s" if first else "no output"
        live.say(f"hostos: {when}{_of_which(guest)}; {live.fetched(figures)}")
    return status


def _of_which(guest: Any) -> str:
    return f" ({guest.started:.2f} s of it to start the machine)" if guest.started else ""


def _since_start() -> float:
    """Seconds since this command was started, Python's own start included."""
    from hostos.machine.process import age_of

    return age_of(os.getpid())


@container.command(name="ls")
@machine_option
@json_option
def list_(machine: str, as_json: bool) -> None:
    """List the containers of a machine."""
    from hostos.cli import live

    with live.guest(machine, steps(), start=False) as guest:
        found = guest.ask("list")["containers"]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    rows = [("NAME", "IMAGE", "STATE", "SECONDS", "FETCHED", "COMMAND")]
    for item in found:
        share = f"{live.megabytes(item['fetched'])} of {live.megabytes(item['size'])}"
        command = " ".join(item["command"]) if not item["init"] else "(init)"
        rows.append((item["name"], item["image"][:16], item["state"], f"{item['seconds']:.0f}", share, command[:60]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows if found else []:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + "  " + row[-1])


@container.command(name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@machine_option
@click.option("--tty/--no-tty", default=None, help="Whether it gets a terminal.  [default: if stdin and stdout are]")
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(machine: str, tty: bool | None, name: str, command: tuple[str, ...]) -> int:
    """Run COMMAND in the running container NAME, as its root."""
    words = list(command[1:] if command[0] == "--" else command)
    if not words:
        raise UserError("no command was given", f"hostos container exec {name} COMMAND")
    return _enter(machine, name, words, tty)


@container.command()
@machine_option
@click.argument("name")
def shell(machine: str, name: str) -> int:
    """Open a shell in the running container NAME, as its root."""
    return _enter(machine, name, [], None)


def _enter(machine: str, name: str, command: list[str], tty: bool | None) -> int:
    from hostos.cli import live

    if tty is None:
        tty = sys.stdin.isatty() and sys.stdout.isatty()
    term = os.environ.get("TERM", "vt100") if tty else ""
    with live.guest(machine, steps(), start=False) as guest:
        argv = guest.ask("exec", within=20.0, name=name, command=command, term=term)["argv"]
        return guest.interact(argv, tty=tty)


@container.command()
@machine_option
@click.option("-f", "--follow", is_flag=True, help="Go on as more comes.")
@click.argument("name")
def logs(machine: str, follow: bool, name: str) -> int:
    """Show what the init of container NAME has said."""
    from hostos.cli import live

    with live.guest(machine, steps(), start=False) as guest:
        argv = guest.ask("logs", name=name, follow=follow)["argv"]
        return guest.interact(argv, tty=False)


@container.command()
@machine_option
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
@json_option
@click.argument("name")
def stats(machine: str, watch: bool, as_json: bool, name: str) -> None:
    """Show what container NAME has fetched, from whom, and how long its reads waited."""
    from hostos.cli import live

    with live.guest(machine, steps(), start=False) as guest:
        while True:
            figures = guest.ask("stats", name=name)
            click.echo(json.dumps(figures, indent=None if watch else 2) if as_json else _stats_text(figures))
            if not watch or figures["state"] == "ended":
                return
            time.sleep(1.0)


def _stats_text(figures: dict[str, Any]) -> str:
    from hostos.cli import live

    lines = [f"{figures['name']}  {figures['state']}  {figures['seconds']:.0f} s  {live.fetched(figures)}"]
    for layer in figures["layers"]:
        lines.append(
            f"  layer {layer['layer'][:16]}  here {live.megabytes(layer['verified'])} of "
            f"{live.megabytes(layer['size'])}, wasted {live.megabytes(layer['wasted'])}"
        )
        lines.append(f"    {_prefetched(layer)}")
        lines.append(
            f"    {layer['reads']} reads, {layer['misses']} waited: median {1000 * layer['wait_median']:.1f} ms, "
            f"p95 {1000 * layer['wait_p95']:.1f} ms, longest {1000 * layer['wait_max']:.0f} ms"
        )
        lines.append(
            f"    {layer['stalls']} stalls, {layer['hash_failures']} wrong pieces, {layer['errors']} failed reads, "
            f"{layer['banned']} banned peers"
        )
        lines += [
            f"    from {peer['peer']}: {live.megabytes(peer['downloaded'])}"
            + (f", now {live.megabytes(peer['rate'])}/s" if peer.get("rate") else "")
            + (f" (suspected {peer['suspicion']} times)" if peer["suspicion"] else "")
            for peer in layer["from"]
        ]
        if layer["last_error"]:
            lines.append(f"    last error: {layer['last_error']}")
    return "\n".join(lines)


def _prefetched(layer: dict[str, Any]) -> str:
    if not layer["prefetched"]:
        return "nothing was fetched ahead"
    share = 100 * layer["prefetch_used"] / layer["prefetched"]
    late = f", {layer['late']} while somebody waited already" if layer["late"] else ""
    return f"{layer['prefetched']} pieces fetched ahead, {share:.0f} % of them read since{late}"


@container.command()
@machine_option
@click.argument("name")
@click.argument("target", metavar="FILE.svg", type=click.Path(path_type=Path, dir_okay=False))
def timeline(machine: str, name: str, target: Path) -> None:
    """Draw which blocks of container NAME came when and why, against what it had reached.

    Works for what runs and for the last few that have ended.
    """
    from hostos.cli import live
    from hostos.cli.timeline import draw

    with live.guest(machine, steps(), start=False) as guest:
        figures = guest.ask("timeline", name=name)
    try:
        target.write_text(draw(figures))
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}", "give another file") from None
    live.say(f"{target}: {sum(len(layer['came']) for layer in figures['layers'])} pieces")


@container.command()
@machine_option
@click.option("--timeout", type=click.FloatRange(0, 3600), default=30.0, show_default=True, metavar="SECONDS",
              help="Kill it if it has not ended by then.")  # fmt: skip
@json_option
@click.argument("name")
def stop(machine: str, timeout: float, as_json: bool, name: str) -> None:
    """Shut container NAME down."""
    from hostos.cli import live, publishing

    with live.guest(machine, steps(), start=False) as guest:
        figures = guest.ask("stop", within=timeout + 30.0, name=name, deadline=timeout)
        publishing.withdraw(guest.instance, figures.get("published", {}))
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    else:
        live.say(f"container {name} {'has shut down' if figures['gently'] else 'was killed'}; {live.fetched(figures)}")
