"""A guest whose address has changed since its start: its lease says so."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from hostos.errors import UserError
from hostos.machine.leases import find, named_source
from hostos.machine.network import address_towards

if TYPE_CHECKING:
    from hostos.machine.instance import Instance, Run


def relocate(instance: Instance, run: Run) -> Run:
    """`run` with the guest's address as its newest lease has it; `run.json` and ssh_config follow.

    Nothing is waited for: without a lease it stays as it was.
    """
    from hostos.machine.identity import ensure_identity
    from hostos.machine.ssh import write_ssh_config

    try:
        sources = [named_source(text) for text in run.lease_files]
    except UserError:
        return run
    found = find(sources, run.mac, run.hostname, time.time())
    if found is None or found.lease.address == run.guest_address:
        return run
    address = found.lease.address
    moved = replace(run, guest_address=address, host_address=address_towards(address), found_by=found.source)
    instance.write_run(moved)
    write_ssh_config(instance, ensure_identity(instance.identity_dir, instance.name), moved.ssh_port)
    return moved
