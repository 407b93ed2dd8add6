"""From a QEMU process to a machine in use: the readiness ladder.

Each rung is a step with a name, a time and a deadline of its own. While any of them is waited for,
QEMU and the serial console are watched, so that what is really wrong is said, and at once.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hostos.errors import UserError
from hostos.machine import root as images
from hostos.machine.identity import Identity
from hostos.machine.instance import Instance
from hostos.machine.network import LOOPBACK
from hostos.machine.watch import Watch
from hostos.steps import Step, Steps

if TYPE_CHECKING:
    from hostos.machine.address import Locator
    from hostos.machine.connection import Connection
    from hostos.machine.leases import Found
    from hostos.machine.monitor import Monitor

# After this long SSH is tried though the console has shown nothing.
QUIET_SECONDS = 3.0
PROBE_EVERY = 0.25
# Once its network is up it refuses at once, without starting a process, until sshd listens: one attempt at
# a time is enough, and another only after it was refused.
REFUSED_EVERY = 0.05
PROBES = 4
# How long one is waited for: this many seconds, or this share of the time since QEMU's start.
PROBE_SECONDS = 1.5
PROBE_SHARE = 0.4
_POLL = 0.03
# How long a guest that announces its network is waited for before it is knocked at all the same.
ANNOUNCEMENT_SECONDS = 12.0


class AcceleratorFailed(Exception):  # noqa: N818
    """QEMU runs under KVM or HVF, but the guest has not printed a byte: it does not execute."""


@dataclass(frozen=True)
class Deadlines:
    """Seconds each rung may take. `first_output` None: not insisted upon; `total` None: no limit."""

    monitor: float = 20.0
    first_output: float | None = None
    lease: float = 30.0
    banner: float = 60.0
    login: float = 30.0
    system: float = 60.0
    root: float = 150.0
    total: float | None = None

    def scaled(self, factor: float) -> Deadlines:
        """All but `total` multiplied."""
        first = None if self.first_output is None else self.first_output * factor
        rungs = (self.monitor, self.lease, self.banner, self.login, self.system, self.root)
        monitor, lease, banner, login, system, root = (each * factor for each in rungs)
        return Deadlines(monitor, first, lease, banner, login, system, root, self.total)


def climb(
    instance: Instance,
    identity: Identity,
    watch: Watch,
    port: int,
    deadlines: Deadlines,
    steps: Steps,
    *,
    announced: bool = False,
    locator: Locator | None = None,
    found: Callable[[Found], None] | None = None,
    root: bool = False,
) -> list[str]:
    """Wait until the machine is ready; returns the names of units that failed in the guest.

    `announced`: the guest says on its agent port when its network is up. `locator`: knows the address
    of a guest that has one of its own; `found` is told it, again if it changes. `root`: its system is an
    image's, which it has to mount first.

    Raises UserError (status 1) saying why, AcceleratorFailed, PortTaken.
    """
    first_life(instance, watch, deadlines, steps)
    # Imported here: it takes a while, in which the guest is booting already.
    from hostos.machine import connection as ssh

    with contextlib.ExitStack() as stack:
        agent = _listen_to_guest(instance, stack) if announced else None
        target = Target(LOOPBACK, port)
        if locator is not None:
            locator.agent, agent = agent, None
            target = _Located(locator, found or (lambda _found: None), port)
            with steps.step("lease found") as step:
                step.detail = _lease(watch, target, deadlines.lease)
        if root:
            images.climb(watch, deadlines.root, steps)
        give_up = time.monotonic() + deadlines.banner
        guest = stack.enter_context(log_in(target, identity, watch, give_up, deadlines.login, steps, agent=agent))
        with steps.step("system is up") as step:
            try:
                return system_state(guest, watch, deadlines.system, step)
            except ssh.ConnectionLost as error:
                watch.check_after_loss()
                raise watch.failed(f"the SSH connection broke: {error}") from error


def log_in(
    target: Target,
    identity: Identity,
    watch: Watch,
    give_up: float,
    seconds: float,
    steps: Steps,
    *,
    agent: socket.socket | None = None,
) -> Connection:
    """A login with the pinned host key and the control key in which a command has run; the caller closes it.

    One that breaks off is tried again until `give_up` (monotonic); each may take `seconds`. `agent`: see
    `greeted`. Raises UserError.
    """
    from hostos.machine import connection as ssh

    while True:
        with steps.step("SSH answers"):
            sock = greeted(target, watch, give_up, agent)
            agent = None
        try:
            with steps.step("key accepted"), contextlib.ExitStack() as undo:
                guest = undo.enter_context(ssh.login(sock, identity, seconds))
                done = guest.run(["true"], timeout=seconds, watch=watch.check)
                if done.status != 0:
                    raise watch.failed(f"`true` in the guest ended with status {done.status}")
                undo.pop_all()
                return guest
        except ssh.ConnectionLost as error:
            watch.check_after_loss()
            if time.monotonic() > give_up:
                raise watch.failed(f"the guest's SSH gives up on each login: {error}") from error


class Target:
    """Where the guest's sshd is reached."""

    def __init__(self, address: str, port: int) -> None:
        self.address = address
        self.port = port
        # Whether each attempt is answered or refused at once, as when the guest's network is up.
        self.prompt = False

    def look(self) -> None:
        """Find out again, where it may change."""


class _Located(Target):
    """The address a locator finds, and the one it finds later."""

    def __init__(self, locator: Locator, found: Callable[[Found], None], port: int) -> None:
        super().__init__("", port)
        self.locator = locator
        self.found = found
        self.last: Found | None = None

    def look(self) -> None:
        new = self.locator.look()
        self.prompt = self.locator.announced
        if new is not None and (self.last is None or new.lease.address != self.last.lease.address):
            self.last = new
            self.address = new.lease.address
            self.found(new)


def _lease(watch: Watch, target: _Located, seconds: float) -> str:
    """Wait until the guest's address is known; returns it and who knew it."""
    give_up = time.monotonic() + seconds
    while target.last is None:
        watch.check()
        if time.monotonic() > give_up:
            locator = target.locator
            heard = "the guest says it has an address; " if locator.announced else ""
            raise watch.failed(
                f"no DHCP lease for {locator.mac} was found within {seconds:g} s: {heard}{locator.why_not()}",
                "is there a DHCP server on that network? Which file has its leases: --lease-file PATH",
            )
        target.look()
        if target.last is None:
            time.sleep(_POLL)
    return f"{target.address}, {target.last.source}"


def first_life(instance: Instance, watch: Watch, deadlines: Deadlines, steps: Steps) -> None:
    """QEMU's monitor, then the console's first byte.

    With an accelerator that byte is the proof that it works, so it is insisted upon, and whatever
    goes wrong before it is put down to the accelerator. Without, some kernels are just quiet.
    """
    try:
        _wait_for_life(instance, watch, deadlines, steps)
    except UserError as error:
        if deadlines.first_output is None or watch.spoke or watch.out_of_time():
            raise
        raise AcceleratorFailed(watch.last_words()) from error


def _wait_for_life(instance: Instance, watch: Watch, deadlines: Deadlines, steps: Steps) -> None:
    from hostos.machine import monitor

    patience = deadlines.first_output or QUIET_SECONDS
    began = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            with steps.step("monitor answers"):
                connected = monitor.connect(instance.monitor_socket, watch.process.alive, timeout=deadlines.monitor)
                qmp = stack.enter_context(connected)
                _check_running(qmp, watch)
            with steps.step("guest speaks"):
                while not watch.spoke:
                    watch.check()
                    if time.monotonic() - began > patience:
                        if deadlines.first_output is None:
                            return
                        raise AcceleratorFailed(f"the guest printed nothing within {patience:g} s")
                    if deadlines.first_output is not None:
                        _check_running(qmp, watch)
                    time.sleep(_POLL)
    except monitor.MonitorError as error:
        watch.check_after_loss()
        raise watch.failed(f"QEMU's monitor does not answer: {error}") from error


def _check_running(qmp: Monitor, watch: Watch) -> None:
    status = qmp.execute("query-status")
    if not status["running"]:
        raise watch.failed(f"QEMU does not run the guest: it is in state {status['status']!r}")


def _listen_to_guest(instance: Instance, stack: contextlib.ExitStack) -> socket.socket | None:
    """The guest's agent port; None if QEMU does not offer it."""
    agent = stack.enter_context(socket.socket(socket.AF_UNIX))
    try:
        agent.connect(str(instance.agent_socket))
    except OSError:
        return None
    agent.setblocking(False)
    return agent


def greeted(target: Target, watch: Watch, give_up: float, agent: socket.socket | None = None) -> socket.socket:
    """A connection on which an SSH server has greeted; the greeting is still to be read.

    With `agent`, the guest says when its network is up: a connection then is answered or refused at
    once. Without, or if it says nothing for `ANNOUNCEMENT_SECONDS`, it is found out by trying.

    QEMU accepts for the guest, and a connection made before the guest listens stalls for seconds
    and may never come to life. So a new one is tried every `PROBE_EVERY` seconds, `PROBES` at a
    time, and the first that is greeted wins. Each lives the longer the slower this machine has
    been so far: giving up on one that sshd was just about to greet only makes more work for it.
    """
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        probes: dict[socket.socket, float] = {}
        next_probe = 0.0
        every, most = PROBE_EVERY, PROBES
        if agent is not None:
            next_probe = time.monotonic() + ANNOUNCEMENT_SECONDS
            selector.register(agent, selectors.EVENT_READ)
        while True:
            watch.check()
            target.look()
            if target.prompt:
                every, most = REFUSED_EVERY, 1
            now = time.monotonic()
            if now > give_up:
                raise watch.failed(
                    f"no SSH server answers on {target.address}:{target.port}",
                    "give it longer (--timeout, HOSTOS_TIMEOUT_SCALE)",
                )
            lifetime = max(PROBE_SECONDS, PROBE_SHARE * (now - watch.began))
            for old in [probe for probe, since in probes.items() if now - since > lifetime]:
                del probes[old]
                _drop(old, selector)
            if now >= next_probe and len(probes) < most:
                next_probe = now + every
                probe = stack.enter_context(_dial(target.address, target.port))
                selector.register(probe, selectors.EVENT_READ)
                probes[probe] = now
            for key, _ in selector.select(_POLL):
                probe = key.fileobj  # type: ignore[assignment]
                if probe is agent:
                    next_probe, every, most = 0.0, REFUSED_EVERY, 1
                    selector.unregister(agent)
                    break
                try:
                    greeting = probe.recv(4, socket.MSG_PEEK)
                except BlockingIOError:
                    continue
                except OSError:
                    greeting = b""
                if greeting == b"SSH-":
                    selector.unregister(probe)
                    winner = probe.dup()
                    winner.setblocking(True)
                    winner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return winner
                del probes[probe]
                _drop(probe, selector)


def _dial(address: str, port: int) -> socket.socket:
    probe = socket.socket()
    probe.setblocking(False)
    probe.connect_ex((address, port))
    return probe


def _drop(probe: socket.socket, selector: selectors.BaseSelector) -> None:
    selector.unregister(probe)
    probe.close()


def system_state(guest: Connection, watch: Watch, seconds: float, step: Step) -> list[str]:
    done = guest.run(["systemctl", "is-system-running", "--wait"], timeout=seconds, watch=watch.check)
    state = done.stdout.decode(errors="replace").strip()
    if state == "running":
        return []
    if done.status == 127:
        step.detail = "no systemd in this guest"
        return []
    if state != "degraded":
        said = done.stderr.decode(errors="replace").strip()
        raise watch.failed(f"the guest's system is {state or 'in an unknown state'} {said}".rstrip())
    listed = guest.run(
        ["systemctl", "list-units", "--failed", "--plain", "--no-legend"], timeout=seconds, watch=watch.check
    )
    failed = [line.split()[0] for line in listed.stdout.decode(errors="replace").splitlines() if line.strip()]
    step.detail = f"degraded: {', '.join(failed)} failed"
    return failed
