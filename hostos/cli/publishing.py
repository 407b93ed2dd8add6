"""Ports of containers on this host: from here into the machine, where the live-boot client carries them on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from hostos.errors import UserError
from hostos.machine import ports
from hostos.machine.instance import Instance
from hostos.machine.network import Forward, parse_publish


def parse(texts: Sequence[str]) -> tuple[Forward, ...]:
    """`[ADDR:]HOST:PORT`, PORT being the container's. Raises UserError."""
    found = tuple(parse_publish(text) for text in texts)
    for forward in found:
        if forward.protocol != "tcp":
            raise UserError(f"--publish {forward}: only TCP is carried into containers", "leave /udp out")
    return found


def asked(forwards: Sequence[Forward], instance: Instance) -> list[str]:
    """What the client is asked to listen on: a machine with an address of its own is reached directly."""
    return [f"{each.host_port if instance.own_address else 0}:{each.guest_port}" for each in forwards]


@contextmanager
def published(
    instance: Instance, forwards: Sequence[Forward], listening: Mapping[str, int], *, keep: bool
) -> Iterator[None]:
    """Published in the context, and (`keep`) beyond it if it ends well.

    `listening`: the container's ports, and where the machine listens for them. Raises UserError if a port of
    this host is taken.
    """
    if instance.own_address or not forwards:
        yield
        return
    wanted = [replace(each, guest_port=listening[str(each.guest_port)]) for each in forwards]
    ports.add(instance, wanted, remember=False)
    done = False
    try:
        yield
        done = True
    finally:
        if not (keep and done):
            for each in wanted:
                with suppress(UserError):
                    ports.remove(instance, each.host_port, each.protocol)


def withdraw(instance: Instance, listening: Mapping[str, int]) -> None:
    """What was published for a container that has ended."""
    if instance.own_address or not listening:
        return
    with suppress(UserError):
        for forward in ports.published(instance):
            if forward.guest_port in listening.values():
                ports.remove(instance, forward.host_port, forward.protocol)
