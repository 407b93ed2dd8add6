"""hostos up, down, kill, run, status, ls, ip: machines.

Only what every command needs is imported at the top: `hostos status` must answer at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hostos.cli.common import json_option, level, machine_option, print_json, reporting, steps, talk_options
from hostos.cli.lifecycle import for_each, machines_of, named
from hostos.errors import FAILED, UserError
from hostos.machine.files import Unreadable
from hostos.machine.instance import Instance, Run, all_instances
from hostos.steps import Steps

if TYPE_CHECKING:
    from hostos.machine.timeline import Recorder

_PASSED_THROUGH = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@click.command()
@machine_option
@click.option("--key", "keys", multiple=True, metavar="PUB", help="SSH public key file to let in. Repeatable.")
@click.option("--memory", type=int, metavar="MIB", help="Memory of the guest.  [default: 1024]")
@click.option("--cpus", type=int, metavar="N", help="CPUs of the guest.  [default: 2]")
@click.option("--os", "os_dir", metavar="DIR", help="OS build.  [default: ./dist, then the data directory]")
@click.option("--arch", metavar="ARCH", help="x86_64 or aarch64: which OS build to take.  [default: this host's]")
@click.option("--kernel", metavar="FILE", help="Boot this kernel instead, of another maker.")
@click.option("--initrd", metavar="FILE", help="With --kernel: its initrd.")
@click.option("--append", metavar="WORDS", help="More words for the kernel's command line.")
@click.option("--accel", metavar="NAME", help="auto, kvm, hvf or tcg.  [default: auto]")
@click.option("--hostname", metavar="NAME", help="Hostname of the guest.  [default: the machine's name]")
@click.option("--publish", "-p", multiple=True, metavar="H:G", help="Host port H leads to guest port G. Repeatable.")
@click.option("--net", metavar="NET", help="user, bridge=NAME, tap=NAME, vmnet (macOS).  [default: user]")
@click.option("--lease-file", "lease_files", multiple=True, metavar="[FORMAT:]PATH",
              help="A DHCP server's leases, for a bridge. Repeatable.  [default: the usual places]")  # fmt: skip
@click.option("--disk", metavar="SIZE|FILE", help="Keep what is fetched, e.g. 20G; none: no more.  [default: none]")
@click.option("--share", "shares", multiple=True, metavar="DIR[:GUEST][:ro]", help="Show a directory. Repeatable.")
@click.option("--reclaim/--no-reclaim", default=None, help="Give memory back that the guest frees.  [default: no]")
@click.option("--root", metavar="HASH|NAME",
              help="Boot this image as the machine's own system; none: ours again.  [default: none]")  # fmt: skip
@click.option("--peer", "peers", multiple=True, metavar="ADDR:PORT",
              help="Who has the image (for a CID: URL of a gateway). Repeatable.")  # fmt: skip
@click.option("--persist/--no-persist", default=None,
              help="Keep what the root changes on the machine's disk.  [default: it is gone at power-off]")  # fmt: skip
@click.option("--timeout", type=float, metavar="SECONDS", help="Give up if it is not ready by then.")
@click.option("--warm/--cold", default=None,
              help="Insist on starting from a template, or boot.  [default: a template if there is one]")  # fmt: skip
@click.option("--timeline", metavar="FILE", help="Draw where the time of this start went: FILE.svg (or .json).")
@click.option("--dry-run", is_flag=True, help="Print the QEMU command line; make its files, start nothing.")
@json_option
@talk_options
def up(
    machine: str,
    keys: Sequence[str],
    memory: int | None,
    cpus: int | None,
    os_dir: str | None,
    arch: str | None,
    kernel: str | None,
    initrd: str | None,
    append: str | None,
    accel: str | None,
    hostname: str | None,
    publish: Sequence[str],
    net: str | None,
    lease_files: Sequence[str],
    disk: str | None,
    shares: Sequence[str],
    reclaim: bool | None,
    root: str | None,
    peers: tuple[str, ...],
    persist: bool | None,
    timeout: float | None,
    warm: bool | None,
    timeline: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Start a machine and wait until it is ready.

    Options that are not given are as in its last start. Without --key a key pair is made once, in
    the state directory, for all machines.

    \b
    With --root the machine boots an image of the network as its own system (docs/root.md):
      hostos up --root web/debian                     one of this host's images
      hostos up --root 7aecf24720… --peer 192.0.2.7:6881 --disk 20G --persist
    """
    from hostos.machine import launcher
    from hostos.machine.disk import normalise
    from hostos.machine.keys import read_public_keys
    from hostos.machine.network import parse_publish
    from hostos.machine.os_image import canonical
    from hostos.machine.qemu import shell_text
    from hostos.machine.share import parse_share

    lines = [key.line for name in keys for key in read_public_keys(Path(name))]
    options = launcher.UpOptions(
        keys=tuple(dict.fromkeys(lines)) or None,
        memory_mib=memory,
        cpus=cpus,
        os=Path(os_dir).expanduser().absolute() if os_dir else None,
        arch=canonical(arch) if arch else None,
        kernel=Path(kernel).expanduser().absolute() if kernel else None,
        initrd=Path(initrd).expanduser().absolute() if initrd else None,
        append=append,
        accel=accel,
        hostname=hostname,
        publish=tuple(parse_publish(text) for text in publish) or None,
        net=net,
        lease_files=tuple(lease_files) or None,
        disk=None if disk is None else normalise(disk),
        shares=tuple(text if text == "none" else str(parse_share(text)) for text in shares) or None,
        reclaim=reclaim,
        timeout=timeout,
        warm=warm,
        persist=persist,
    )
    if root is not None or peers:
        from hostos.cli.root import chosen

        options = chosen(options, machine, root, peers)
    if dry_run:
        command = launcher.dry_run(machine, options, steps())
        if as_json:
            print_json({"schema": 1, "machine": machine, "command": command})
        else:
            click.echo(shell_text(command))
        return
    began = time.monotonic()
    recorder = _recorder(timeline)
    with reporting(as_json) as (told, events):
        instance = launcher.up(machine, options, Steps(told.emit, recorder) if recorder else told)
        seconds = time.monotonic() - began
        if recorder and timeline:
            _draw(instance, recorder, timeline, told)
        if events:
            events.result(description(instance))
            return
    option = "" if machine == "default" else f" -m {machine}"
    if level() != "quiet":
        ours = instance.require_run().reached == "system"
        what, shell = ("READY", "Open a shell: hostos ssh") if ours else ("RUNNING", "Its console: hostos console")
        click.echo(f"{what} after {seconds:.2g} s. {shell}{option}", err=True)


def _recorder(target: str | None) -> Recorder | None:
    if target is None:
        return None
    from hostos.machine import timeline

    timeline.check_target(target)
    return timeline.Recorder(timeline.process_began())


def _draw(instance: Instance, recorder: Recorder, target: str, told: Steps) -> None:
    """The machine is up: what goes wrong from here on is a warning."""
    from hostos.machine import timeline
    from hostos.machine.connection import connect

    run = instance.require_run()
    spans = list(recorder.spans)
    how = f"{run.accelerator}, {run.cpus} CPUs, {run.memory_mib} MiB"
    title = f"machine {instance.name}: {Path(run.os_directory).name}, Linux {run.kernel_version}, {how}"
    try:
        if run.reached == "system":
            with connect(instance, deadline=60.0) as guest:
                spans += timeline.of_guest(guest, recorder.began)
        timeline.write(target, title, spans)
    except UserError as error:
        told.warning(str(error))


@click.command()
@named
@click.option("--timeout", type=float, help="Seconds to let the guest power off.  [default: 30]")
@json_option
@talk_options
def down(names: Sequence[str], more: Sequence[str], timeout: float | None, as_json: bool) -> None:
    """Power machines off."""
    from hostos import config
    from hostos.machine import launcher

    facts: list[dict[str, Any]] = []

    def one(machine: str) -> None:
        stopped = launcher.down(machine, steps(), timeout=timeout or config.get("timeouts.down"))
        facts.append(
            {"schema": 1, "machine": machine, "how": stopped.how, "clean": stopped.clean, "seconds": stopped.seconds}
        )
        if not stopped.clean and not as_json:
            click.echo(f"machine {machine!r} did not power itself off; ended by {stopped.how}", err=True)

    _print_each(machines_of(names, more), one, facts if as_json else None)


@click.command()
@named
@json_option
def kill(names: Sequence[str], more: Sequence[str], as_json: bool) -> None:
    """End machines at once, without asking the guest."""
    from hostos.machine import launcher

    facts: list[dict[str, Any]] = []

    def one(machine: str) -> None:
        pids = launcher.kill(machine)
        facts.append({"schema": 1, "machine": machine, "killed": pids})
        if not as_json:
            click.echo(f"killed {', '.join(map(str, pids))}", err=True)

    _print_each(machines_of(names, more), one, facts if as_json else None)


def _print_each(machines: list[str], work: Callable[[str], None], facts: list[dict[str, Any]] | None) -> None:
    """`work` for each machine; then what it found out: of one as it is, of several as a list."""
    try:
        for_each(machines, work)
    finally:
        if facts:
            print_json(facts[0] if len(machines) == 1 else facts)


@click.command(context_settings=_PASSED_THROUGH)
@machine_option
@click.option("--tty/--no-tty", default=None, help="Whether it gets a terminal.  [default: if stdin and stdout are]")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(machine: str, tty: bool | None, command: tuple[str, ...]) -> int:
    """Run COMMAND in the guest, bringing the machine up if needed.

    stdin, stdout, stderr and the exit status are the command's. The machine stays up.
    """
    from hostos.machine import launcher
    from hostos.machine.connection import ConnectionLost, connect

    instance = launcher.ensure_up(machine, steps())
    if tty is None:
        tty = sys.stdin.isatty() and sys.stdout.isatty()
    with connect(instance, deadline=60.0) as guest:
        try:
            return guest.interact(command, tty=tty)
        except ConnectionLost as error:
            raise UserError(str(error), f"hostos status -m {machine}", status=FAILED) from error


@click.command()
@machine_option
@json_option
def status(machine: str, as_json: bool) -> None:
    """Say what a machine is doing."""
    facts = description(Instance.load(machine))
    if as_json:
        print_json(facts)
        return
    click.echo(facts["state"])
    if facts["reason"]:
        click.echo(f"  {facts['reason']}", err=True)
    for name in (
        "uptime_seconds",
        "hostname",
        "architecture",
        "accelerator",
        "cpus",
        "memory_mib",
        "pid",
        "os",
        "publish",
        "net",
        "address",
        "disk",
        "shares",
        "root",
        "failed_units",
    ):
        if facts.get(name) not in (None, [], ""):
            click.echo(f"  {name.replace('_', ' ')}: {facts[name]}")
    if "ssh" in facts:
        click.echo(f"  ssh: {facts['ssh']['command']}")


@click.command()
@json_option
def ls(as_json: bool) -> None:
    """List all machines."""
    machines = [description(instance) for instance in all_instances()]
    if as_json:
        print_json(machines)
        return
    row = "{:<20} {:<13} {:<20} {:>6} {:>5} {:>9}  {}"
    click.echo(row.format("NAME", "STATE", "HOSTNAME", "MIB", "CPUS", "SSH PORT", "NOTE").rstrip())
    for facts in machines:
        port = facts["ssh"]["port"] if "ssh" in facts else ""
        values = [facts.get(name, "") for name in ("hostname", "memory_mib", "cpus")]
        click.echo(row.format(facts["machine"], facts["state"], *values, port, facts["reason"]).rstrip())


@click.command()
@machine_option
@json_option
def ip(machine: str, as_json: bool) -> None:
    """Print the address at which this host reaches a machine."""
    instance = Instance.load(machine)
    started = instance.require_running()
    if as_json:
        print_json(
            {
                "schema": 1,
                "machine": machine,
                "address": instance.address,
                "ssh_port": started.ssh_port,
                "guest_address": instance.guest_address,
                "host_address_from_guest": instance.host_address_from_guest,
            }
        )
        return
    click.echo(instance.address)
    if started.guest_address:
        click.echo(
            f"Found by its lease: {started.found_by}. This host is {started.host_address} there.",
            err=True,
        )
        return
    click.echo(
        f"SSH is on port {started.ssh_port}. Inside, the guest is {instance.guest_address} "
        f"and this host {instance.host_address_from_guest}.",
        err=True,
    )


def description(instance: Instance) -> dict[str, Any]:
    """What there is to know about a machine, for `--json` (docs/machine.md)."""
    state, reason = instance.state()
    facts: dict[str, Any] = {
        "schema": 1,
        "machine": instance.name,
        "state": state,
        "reason": reason,
        "directory": str(instance.directory),
    }
    try:
        started = instance.run()
    except Unreadable:
        started = None
    if started and state not in ("stopped", "broken"):
        facts |= _description_of_run(instance, started)
    return facts


def _description_of_run(instance: Instance, started: Run) -> dict[str, Any]:
    alias = f"hostos-{instance.name}"
    process = instance.process()
    return {
        "pid": started.pid,
        "uptime_seconds": round(process.age_seconds(), 1) if process else 0.0,
        "hostname": started.hostname,
        "architecture": started.architecture,
        "accelerator": started.accelerator,
        "accelerator_reason": started.accelerator_reason,
        "cpus": started.cpus,
        "memory_mib": started.memory_mib,
        "os": started.os_directory,
        "kernel_version": started.kernel_version,
        "publish": [str(forward) for forward in started.forwards],
        "net": started.net,
        "found_by": started.found_by,
        "disk": started.disk,
        "shares": started.shares,
        "root": started.root,
        "persist": started.persist,
        "address": instance.address,
        "swarm_port": started.swarm_port,
        "ssh": {
            "host": instance.address,
            "port": started.ssh_port,
            "user": "root",
            "config": str(instance.ssh_config),
            "command": f"ssh -F {instance.ssh_config} {alias}",
        },
        "stages": started.stages,
        "reached": started.reached,
        "failed_units": started.failed_units,
        "template": started.template or None,
    }
