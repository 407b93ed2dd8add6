"""Warm start: a machine loaded from its template, told who it is, reached over SSH."""

from __future__ import annotations

import os
import secrets
import shlex
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from hostos.machine import qemu
from hostos.machine.identity import Identity
from hostos.machine.options import timeout_scale
from hostos.machine.process import QemuProcess
from hostos.machine.qmp import Qmp, QmpError, dial
from hostos.machine.template import Template, cloning
from hostos.steps import Steps

# Loading takes 0.05 s and the answer as long on an idle host; a silent one must not be waited for long.
_LOAD_SECONDS = 5.0
_ANSWER_SECONDS = 2.0
_ANSWER = b"identity\n"


__all__ = ["CloneFailed", "Person", "cloning", "person", "take_over"]


class CloneFailed(Exception):  # noqa: N818
    """The template did not become a machine. The message says why; it should not be tried again."""


@dataclass(frozen=True)
class Person:
    """Who a clone becomes: everything that must not be as in the template or in another clone."""

    hostname: str
    mac: str
    authorized_keys: str
    host_key: str
    host_key_public: str
    machine_id: str
    boot_id: str
    entropy: str

    def script(self) -> bytes:
        """As the guest reads it: shell assignments, ended by a line `#end`."""
        values = {**vars(self), "time": str(round(time.time()))}
        lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
        # Twice: who reads it there looks one line ahead.
        return "\n".join([*lines, "#end", "#end", ""]).encode()


def person(identity: Identity, hostname: str, mac: str, keys: Sequence[str]) -> Person:
    """A new one: what is drawn at random is drawn anew at each start, as when booting."""
    return Person(
        hostname=hostname,
        mac=mac,
        authorized_keys="".join(f"{line}\n" for line in (identity.control.line, *keys)),
        host_key=identity.host.private.read_text(),
        host_key_public=f"{identity.host.line}\n",
        machine_id=uuid.uuid4().hex,
        boot_id=str(uuid.uuid4()),
        entropy=secrets.token_hex(64),
    )


def take_over(config: qemu.Config, template: Template, process: QemuProcess, who: Person, steps: Steps) -> None:
    """Load the saved machine into `process`, let it run, and tell it who it is.

    Raises CloneFailed.
    """
    patience = timeout_scale() * (1.0 + os.getloadavg()[0] / (os.cpu_count() or 1))
    give_up = time.monotonic() + _LOAD_SECONDS * patience
    try:
        with steps.step("template loaded"):
            agent = dial(config.agent_socket, process.alive, give_up)
            with template.state.open("rb") as state, Qmp(config.monitor_socket, process.alive, give_up) as monitor:
                monitor.leave_memory_out(give_up)
                monitor.load(state.fileno(), give_up)
                monitor.execute("cont", give_up=give_up)
        with agent, steps.step("identity taken"):
            give_up = time.monotonic() + _ANSWER_SECONDS * patience
            agent.settimeout(0.1)
            agent.sendall(who.script())
            said = b""
            while not said.endswith(_ANSWER):
                try:
                    data = agent.recv(4096)
                except TimeoutError:
                    if not process.alive():
                        raise CloneFailed("QEMU ended") from None
                    if time.monotonic() > give_up:
                        seconds = _ANSWER_SECONDS * patience
                        raise CloneFailed(f"it did not take on its identity within {seconds:.1f} s") from None
                    continue
                if not data:
                    raise CloneFailed("QEMU ended")
                said += data
    except (QmpError, OSError) as error:
        raise CloneFailed(str(error)) from error
