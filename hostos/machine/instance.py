"""Machines as directories. What a machine does now is always found out, never written down.

docs/machine.md describes every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hostos.errors import UserError
from hostos.machine import lock
from hostos.machine.files import Unreadable, read_json, write_json
from hostos.machine.names import check_machine_name
from hostos.machine.network import GUEST_ADDRESS, HOST_FROM_GUEST, LOOPBACK, Forward
from hostos.machine.os_image import host_arch
from hostos.paths import private_dir, runtime_dir, state_dir

if TYPE_CHECKING:
    from hostos.machine.process import QemuProcess

State = Literal["running", "starting", "stopping", "interrupted", "unresponsive", "suspended", "stopped", "broken"]
# What a machine does while a command holds its lock; others leave it as it is.
_TRANSITIONS: dict[str, State] = {
    "up": "starting",
    "restart": "starting",
    "resume": "starting",
    "down": "stopping",
    "suspend": "stopping",
    "rm": "stopping",
}
# Longer names are replaced: a socket path is limited (hostos.paths.SOCKET_PATH_LIMIT).
LONGEST_SOCKET_NAME = 22


@dataclass(frozen=True)
class Run:
    """One start of a machine, as it was made (`run.json`); times in seconds since 1970.

    `process_start` tells QEMU from another process with its pid (hostos.machine.process.start_of).
    `ready_at` is set once the last rung of the readiness ladder was reached.
    """

    pid: int
    process_start: str
    started_at: float
    hostname: str
    ssh_port: int
    swarm_port: int
    accelerator: str
    accelerator_reason: str
    cpus: int
    memory_mib: int
    os_directory: str
    kernel_version: str
    command: list[str]
    publish: list[dict[str, Any]] = field(default_factory=list)
    ready_at: float | None = None
    # How far a guest of another maker came (hostos.machine.other_guest).
    reached: str = "system"
    stages: list[dict[str, Any]] = field(default_factory=list)
    failed_units: list[str] = field(default_factory=list)
    template: str = ""
    # Only where the guest has an address of its own, once it is known: as it and this host call each other.
    net: str = "user"
    guest_address: str = ""
    host_address: str = ""
    found_by: str = ""
    mac: str = ""
    lease_files: list[str] = field(default_factory=list)
    disk: str = ""
    shares: list[str] = field(default_factory=list)
    reclaim: bool = False
    # The image that is its root, and whether its changes are kept.
    root: str = ""
    persist: bool = False
    arch: str = ""

    @property
    def architecture(self) -> str:
        """The guest's; what older versions started was of the host's."""
        return self.arch or host_arch()

    @property
    def forwards(self) -> tuple[Forward, ...]:
        """The ports published by the user."""
        return tuple(Forward(**each) for each in self.publish)


@dataclass(frozen=True)
class Instance:
    """A machine by name; its directory may not exist (yet)."""

    name: str
    directory: Path

    @classmethod
    def named(cls, name: str) -> Instance:
        """The machine `name`, whether it exists or not. Raises UserError for what is no name."""
        return cls(check_machine_name(name), machines_dir() / name)

    @classmethod
    def load(cls, name: str) -> Instance:
        """The existing machine `name`; raises UserError if there is none."""
        instance = cls.named(name)
        if not instance.exists():
            option = "" if name == "default" else f" -m {name}"
            raise UserError(f"there is no machine {name!r}", f"make it: hostos up{option}")
        return instance

    # Files -----------------------------------------------------------------------------------

    @property
    def identity_dir(self) -> Path:
        return self.directory / "identity"

    @property
    def config_file(self) -> Path:
        return self.directory / "config.json"

    @property
    def run_file(self) -> Path:
        return self.directory / "run.json"

    @property
    def lock_file(self) -> Path:
        return self.directory / "lock"

    @property
    def pid_file(self) -> Path:
        return self.directory / "qemu.pid"

    @property
    def qemu_log(self) -> Path:
        return self.directory / "qemu.log"

    @property
    def serial_log(self) -> Path:
        return self.directory / "serial.log"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    @property
    def saved(self) -> Path:
        """What `hostos suspend` has saved; there is no half of it."""
        return self.directory / "saved"

    @property
    def saved_part(self) -> Path:
        return self.directory / "saved.part"

    @property
    def ssh_config(self) -> Path:
        return self.directory / "ssh_config"

    @cached_property
    def socket_dir(self) -> Path:
        short = self.name
        if len(short) > LONGEST_SOCKET_NAME:
            # "_" cannot begin a machine's name.
            short = "_" + hashlib.sha256(self.name.encode()).hexdigest()[:16]
        return runtime_dir() / "m" / short

    @property
    def monitor_socket(self) -> Path:
        return self.socket_dir / "monitor.sock"

    @property
    def console_socket(self) -> Path:
        return self.socket_dir / "console.sock"

    @property
    def agent_socket(self) -> Path:
        return self.socket_dir / "agent.sock"

    def exists(self) -> bool:
        return self.directory.is_dir()

    def make_directory(self) -> None:
        """Make the machine's directory. Raises UserError if that cannot be done."""
        private_dir(self.directory)

    def make_socket_dir(self) -> None:
        """Make the sockets' directory, which goes when QEMU has ended (hostos.machine.stop.tidy): whoever makes it
        sees to that first. Raises UserError if it cannot be made, or others could reach what is in it.
        """
        private_dir(self.socket_dir)
        for path in (runtime_dir(), self.socket_dir):
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise UserError(f"{path} belongs to somebody else", "remove it, or set HOSTOS_HOME")
            if status.st_mode & 0o077:
                path.chmod(0o700)

    # What was started ------------------------------------------------------------------------

    def run(self) -> Run | None:
        """How it was last started, None if never; raises Unreadable."""
        content = read_json(self.run_file)
        if content is None:
            return None
        content.pop("schema")
        try:
            return Run(**content)
        except TypeError as error:
            raise Unreadable(f"{self.run_file} is incomplete: {error}") from error

    def write_run(self, run: Run) -> None:
        write_json(self.run_file, asdict(run))

    def mark_ready(self, run: Run, at: float, stages: list[dict[str, Any]], failed_units: list[str]) -> Run:
        ready = replace(run, ready_at=at, stages=stages, failed_units=failed_units)
        self.write_run(ready)
        return ready

    def require_run(self) -> Run:
        """How it was started; raises UserError if that is not known (any more)."""
        try:
            run = self.run()
        except Unreadable as error:
            raise UserError(str(error), f"hostos kill -m {self.name}, then up again") from error
        if run is None:
            raise UserError(f"machine {self.name!r} was never started", f"hostos up -m {self.name}")
        return run

    @property
    def address(self) -> str:
        """Where this host reaches its ports: its own address on a bridge, else 127.0.0.1."""
        run = self._known_run()
        return (run.guest_address if run else "") or LOOPBACK

    @property
    def guest_address(self) -> str:
        """Its own address, as it knows it."""
        run = self._known_run()
        return (run.guest_address if run else "") or GUEST_ADDRESS

    @property
    def host_address_from_guest(self) -> str:
        """How it reaches this host: on a bridge at an address of it, else 10.0.2.2, which is this host's loopback."""
        run = self._known_run()
        return (run.host_address if run else "") or HOST_FROM_GUEST

    @property
    def own_address(self) -> bool:
        """Whether it is on a bridge, where it and this host meet at addresses of their own."""
        run = self._known_run()
        return bool(run and run.guest_address)

    def _known_run(self) -> Run | None:
        try:
            return self.run()
        except Unreadable:
            return None

    @property
    def ssh_port(self) -> int:
        """The port of `address` that leads to the guest's sshd."""
        return self.require_run().ssh_port

    @property
    def swarm_port(self) -> int:
        """The port of `address` (TCP and UDP) that leads to the guest's BitTorrent port, 6881."""
        return self.require_run().swarm_port

    # What it does now ------------------------------------------------------------------------

    def process(self) -> QemuProcess | None:
        """The QEMU that runs it now."""
        if not self.pid_file.is_file():
            return None
        from hostos.machine.process import find

        return find(self.pid_file)

    def alive(self) -> bool:
        """Whether its QEMU runs and answers (the guest may still be booting)."""
        return self.state()[0] in ("running", "starting", "stopping")

    def state(self, *, locked: bool = False) -> tuple[State, str]:
        """What it does now, and an explanation where there is something to explain.

        `locked`: the caller holds the lock, so nobody else is at work on it.
        """
        busy = None if locked else lock.holder(self.lock_file)
        if busy and busy.verb in _TRANSITIONS:
            return _TRANSITIONS[busy.verb], f"hostos {busy.verb}, process {busy.pid}"
        process = self.process()
        try:
            run = self.run()
        except Unreadable as error:
            return "broken", str(error)
        if self.saved.is_dir():
            # Whether or not the QEMU that was saved has ended: it was halted before.
            return "suspended", ""
        if process is None:
            return "stopped", ""
        if run is None or (run.pid, run.process_start) != (process.pid, process.start):
            return "interrupted", "its start was interrupted before it was recorded"
        if run.ready_at is None:
            return "interrupted", "its start was interrupted before the guest was ready"
        if self.saved_part.is_dir():
            return "suspended", "hostos suspend was interrupted; the guest is halted in memory"
        if not monitor_answers(self.monitor_socket):
            return "unresponsive", f"QEMU (process {process.pid}) does not answer on {self.monitor_socket}"
        return "running", ""

    def require_running(self) -> Run:
        """How it was started; raises UserError unless it is running."""
        state, why = self.state()
        if state != "running":
            raise UserError(
                f"machine {self.name!r} is not running: it is {state}" + (f" ({why})" if why else ""),
                f"hostos up -m {self.name}",
            )
        run = self.require_run()
        if run.guest_address:
            from hostos.machine.relocate import relocate

            run = relocate(self, run)
        return run


def machines_dir() -> Path:
    return state_dir() / "machines"


def all_instances() -> list[Instance]:
    """Every machine there is, by name; also broken ones."""
    try:
        names = sorted(path.name for path in machines_dir().iterdir() if path.is_dir())
    except OSError:
        return []
    found = []
    for name in names:
        try:
            found.append(Instance.named(name))
        except UserError:
            continue
    return found


def monitor_answers(path: Path, timeout: float = 3.0) -> bool:
    """Whether a QEMU greets on the monitor socket `path` (docs/interop/qmp-spec of QEMU).

    It greets one client at a time; others wait in a short queue, or are told to try again.
    """
    give_up = time.monotonic() + timeout
    while time.monotonic() < give_up:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(max(0.01, give_up - time.monotonic()))
            try:
                client.connect(os.fspath(path))
                with client.makefile("rb") as stream:
                    return "QMP" in json.loads(stream.readline())
            except BlockingIOError:
                time.sleep(0.01)
            except (OSError, ValueError):
                return False
    return False
