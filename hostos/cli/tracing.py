"""Booting an image in a machine to see what it reads: joins image store, seed and live-boot daemon."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostos.cli import live
from hostos.errors import UserError, failure
from hostos.image import retrace
from hostos.image.layout import Layout
from hostos.image.recording import Recorded, Recording, from_reads
from hostos.image.store import Store, StoredImage
from hostos.machine.connection import drain, has_ended
from hostos.steps import Step, Steps, Talk

CONTAINER = "tracing"
DEADLINE = 60.0
"""Seconds for the first blocks."""


@dataclass(frozen=True)
class How:
    """`commands`: workloads (an empty one: what the image says, or its init); `seconds`: how long one
    that does not end is watched; `machine`: where; `root`: first of all a start of a machine of its own with the
    image as its system."""

    commands: tuple[tuple[str, ...], ...]
    seconds: float
    machine: str
    root: bool = False


def record(store: Store, image: StoredImage, how: How, steps: Steps) -> Recording:
    """Boot each workload of a twin of the image in the guest, and note what it reads.

    Raises UserError: it can't be booted, or a command fails.
    """
    with contextlib.ExitStack() as stack:
        twin, layout = stack.enter_context(retrace.twin(store, image, steps))
        found = []
        if how.root:
            with steps.step("boot it as a machine's system") as step:
                found.append(_recorded((), _root_reads(twin, Steps(Talk(level="quiet"))), layout, image, step))
        if not how.commands:
            return Recording(tuple(found))
        guest = stack.enter_context(live.guest(how.machine, steps, start=True))
        where = live.peers_and_bundle(live.resolve(twin, ()), guest.instance, bare=False)
        for command in how.commands:
            wanted = command or image.manifest.boot.command
            with steps.step(f"boot {' '.join(wanted) or 'its init'}"[:60]) as step:
                found.append(_boot(guest, where, wanted, layout, image, how.seconds, step))
        # Nobody will ever boot the twin again.
        with contextlib.suppress(UserError):
            guest.ask("prune", images=[twin])
        return Recording(tuple(found))


def _root_reads(twin: str, steps: Steps) -> list[tuple[int, int, int]]:
    """What a machine reads of it until all of its system has started. Raises UserError."""
    from hostos.cli.root import chosen
    from hostos.machine import launcher, lifecycle

    machine = f"tracing-{os.getpid()}"
    options = chosen(launcher.UpOptions(append="hostos.trace=1", warm=False), machine, twin, ())
    try:
        launcher.up(machine, options, steps)
        with live.guest(machine, steps, start=False) as guest:
            return [(layer, offset, length) for layer, offset, length in guest.ask("reads", name="root")["reads"]]
    finally:
        with contextlib.suppress(UserError):
            lifecycle.remove(machine, force=True)


def _boot(
    guest: live.Guest,
    where: dict[str, Any],
    command: Sequence[str],
    layout: Layout,
    image: StoredImage,
    seconds: float,
    step: Step,
) -> Recorded:
    prepared = guest.ask(
        "prepare",
        within=2 * DEADLINE,
        name=CONTAINER,
        command=list(command),
        init=not command,
        console="pipe" if command else "read-only",
        deadline=DEADLINE,
        hold=True,
        trace=True,
        **where,
    )
    name = str(prepared["name"])
    if command:
        _run(guest, prepared["argv"], command, seconds)
    else:
        if not guest.ask("start", within=seconds, name=name, ready_within=seconds)["ready"]:
            raise failure(
                f"the image's init did not say that it is up within {seconds:g} s", "give it longer: --seconds 300"
            )
    with contextlib.suppress(UserError):
        guest.ask("stop", within=30.0, name=name, deadline=5.0)
    reads = [(layer, offset, length) for layer, offset, length in guest.ask("reads", name=name)["reads"]]
    return _recorded(command, reads, layout, image, step)


def _recorded(
    command: Sequence[str], reads: list[tuple[int, int, int]], layout: Layout, image: StoredImage, step: Step
) -> Recorded:
    """Raises UserError: no file was read."""
    recorded = from_reads(command, reads, layout, len(image.manifest.layers) - 1)
    files = {touch.path for touch in recorded.touches if not isinstance(touch, tuple)}
    step.detail = f"{len(files)} files read"
    if not files:
        raise failure("the boot read no file of the image's top layer: there is nothing to sort")
    return recorded


def _run(guest: live.Guest, argv: list[str], command: Sequence[str], seconds: float) -> None:
    """Run it to its end, or for `seconds`; its output goes to stderr. Raises UserError if it fails."""
    channel = guest.connection.start(argv)
    give_up = time.monotonic() + seconds
    out, err = bytearray(), bytearray()
    with contextlib.closing(channel):
        channel.shutdown_write()
        while not (has_ended(channel) and not drain(channel, out, err)):
            drain(channel, out, err)
            if time.monotonic() > give_up:
                return
            time.sleep(0.02)
        status = guest.connection.status(channel, command[0])
    sys.stderr.write((out + err).decode(errors="replace"))
    if status:
        raise failure(
            f"the traced command {' '.join(command)[:80]} ended with status {status}: its boot is no model",
            "see that it works first: hostos container boot IMAGE -- COMMAND",
        )


def traced(
    store: Store, image: StoredImage, how: How | None, recording: Path | None, save: Path | None, steps: Steps
) -> str:
    """The hash of the image packed for its workloads: recorded now (`how`), or read from a file."""
    if recording is not None:
        found = Recording.read(recording)
    else:
        assert how is not None
        found = record(store, image, how, steps)
    if save is not None:
        try:
            save.write_bytes(found.to_json())
        except OSError as error:
            raise UserError(f"{save}: {error.strerror}", "give another --save") from None
    return retrace.repack(store, image, found, steps)
