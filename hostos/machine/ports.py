"""Ports published and withdrawn while a machine runs, through QEMU's monitor.

QEMU has no QMP command for them; `hostfwd_add` and `hostfwd_remove` of its human monitor answer in
prose (net/slirp.c): nothing when a port was added, a sentence in every other case.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from hostos.errors import UserError, failure
from hostos.hostsystem import who_listens
from hostos.machine import network
from hostos.machine.files import Unreadable, write_json
from hostos.machine.instance import Instance, Run
from hostos.machine.lock import locked
from hostos.machine.network import Forward
from hostos.machine.options import UpOptions
from hostos.machine.plan import remembered_options

if TYPE_CHECKING:
    from hostos.machine.monitor import Monitor

NETDEV = "net0"
# Other commands hold the machine's lock for a moment only, except a start.
_WAIT_FOR_OTHERS = 10.0
# A line of `info usernet` (libslirp's slirp_connection_info): protocol, fd, source, destination.
_LISTENING = re.compile(r"(TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+\S+\s+(\d+)\s")


def published(instance: Instance) -> tuple[Forward, ...]:
    """The ports that are published now, or will be when the machine is started. Raises UserError."""
    if instance.state()[0] == "running":
        return instance.require_run().forwards
    return _remembered(instance)


def add(instance: Instance, forwards: Sequence[Forward], *, remember: bool = True) -> bool:
    """Publish `forwards`, all or none, now and (`remember`) at each later start.

    Returns whether the machine runs, so that they lead somewhere already. Raises UserError if a
    port is taken; then nothing has changed.
    """
    with locked(instance.lock_file, instance.name, "port add", wait=_WAIT_FOR_OTHERS):
        _check_network(instance, forwards)
        wanted = _with(_remembered(instance), forwards if remember else ())
        run = _run(instance)
        if run is not None:
            with _monitor(instance) as monitor, contextlib.ExitStack() as undo:
                for forward in forwards:
                    _open(monitor, forward)
                    undo.callback(_close, monitor, forward)
                instance.write_run(replace(run, publish=[asdict(each) for each in _with(run.forwards, forwards)]))
                undo.pop_all()
        _remember(instance, wanted)
    return run is not None


def remove(instance: Instance, port: int, protocol: network.Protocol) -> Forward:
    """Withdraw what is published on `port` of the host; connections that exist stay open.

    Raises UserError if nothing is published there.
    """
    with locked(instance.lock_file, instance.name, "port rm", wait=_WAIT_FOR_OTHERS):
        run = _run(instance)
        remembered = _remembered(instance)
        known = (*(run.forwards if run else ()), *remembered)
        found = next((each for each in known if (each.host_port, each.protocol) == (port, protocol)), None)
        if found is None:
            raise UserError(
                f"machine {instance.name!r} publishes nothing on port {port}/{protocol}",
                f"hostos port ls -m {instance.name}",
            )
        if run is not None and found in run.forwards:
            with _monitor(instance) as monitor:
                _close(monitor, found)
            left = [asdict(each) for each in run.forwards if each != found]
            instance.write_run(replace(run, publish=left))
        _remember(instance, tuple(each for each in remembered if (each.host_port, each.protocol) != (port, protocol)))
    return found


def _check_network(instance: Instance, forwards: Sequence[Forward]) -> None:
    """Raises UserError for a machine that has an address of its own."""
    run = _run(instance)
    net = run.net if run else str(_options(instance).network)
    if net == "user":
        return
    where = run.guest_address if run and run.guest_address else "its address"
    raise UserError(
        f"machine {instance.name!r} has an address of its own (--net {net}): nothing is published for it",
        f"connect to {where}:{forwards[0].guest_port}",
    )


def _with(present: Sequence[Forward], added: Sequence[Forward]) -> tuple[Forward, ...]:
    """Raises UserError if a host port would be published twice."""
    used = {(each.host_port, each.protocol): each for each in present}
    for forward in added:
        other = used.get((forward.host_port, forward.protocol))
        if other is not None:
            raise UserError(
                f"port {forward.host_port}/{forward.protocol} is published already: {other}",
                f"choose another, or first: hostos port rm {forward.host_port}/{forward.protocol}",
            )
        used[forward.host_port, forward.protocol] = forward
    return tuple(used.values())


def _run(instance: Instance) -> Run | None:
    """How the machine was started if it runs; raises UserError in between."""
    state, why = instance.state(locked=True)
    if state in ("interrupted", "unresponsive"):
        raise UserError(f"machine {instance.name!r} is {state}: {why}", f"hostos status -m {instance.name}")
    return instance.require_run() if state == "running" else None


def _remembered(instance: Instance) -> tuple[Forward, ...]:
    return _options(instance).publish or ()


def _options(instance: Instance) -> UpOptions:
    try:
        return remembered_options(instance)
    except Unreadable as error:
        raise UserError(str(error), f"hostos up -m {instance.name} starts it from the defaults") from error


def _remember(instance: Instance, forwards: tuple[Forward, ...]) -> None:
    write_json(instance.config_file, replace(remembered_options(instance), publish=forwards).to_json())


@contextlib.contextmanager
def _monitor(instance: Instance) -> Iterator[Monitor]:
    from hostos.machine import monitor

    process = instance.process()
    try:
        with monitor.connect(instance.monitor_socket, process.alive if process else lambda: False, timeout=5.0) as qmp:
            yield qmp
    except monitor.MonitorError as error:
        raise failure(f"QEMU's monitor: {error}", f"hostos status -m {instance.name}") from error


def _open(monitor: Monitor, forward: Forward) -> None:
    if not network.is_free(forward.host_port, forward.protocol, forward.address) and forward not in listening(monitor):
        raise taken(forward)
    said = _say(monitor, f"hostfwd_add {NETDEV} {forward.rule()}")
    # One that QEMU has already is what was wanted: a command that was killed had not written it down.
    if said and forward not in listening(monitor):
        raise taken(forward) if "Could not set up" in said else failure(f"QEMU does not publish {forward}: {said}")


def _close(monitor: Monitor, forward: Forward) -> None:
    _say(monitor, f"hostfwd_remove {NETDEV} {forward.protocol}:{forward.address}:{forward.host_port}")


def listening(monitor: Monitor) -> set[Forward]:
    """The ports on which QEMU listens for the guest, as it says itself."""
    found = set()
    for protocol, address, host_port, guest_port in _LISTENING.findall(_say(monitor, "info usernet")):
        kind: network.Protocol = "udp" if protocol == "UDP" else "tcp"
        found.add(Forward(int(host_port), int(guest_port), kind, "0.0.0.0" if address == "*" else address))
    return found


def _say(monitor: Monitor, line: str) -> str:
    return str(monitor.execute("human-monitor-command", {"command-line": line})).strip()


def taken(forward: Forward) -> UserError:
    where = f"{forward.address}:{forward.host_port}/{forward.protocol}"
    if forward.host_port < 1024:
        hint = f"publish another; ports below 1024 need root on most systems ({who_listens()} shows who holds it)"
    else:
        hint = f"publish another, or end what holds it ({who_listens()} shows it)"
    return UserError(f"port {where} is taken", hint)
