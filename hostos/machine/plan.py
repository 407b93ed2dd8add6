"""From what was asked to exactly what will be started; nothing is changed on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hostos.errors import UserError
from hostos.hostsystem import who_listens
from hostos.machine import accel, bridge, configured, network, os_image, other_guest, qemu, root
from hostos.machine.disk import Disk, plan_disk, same_file
from hostos.machine.files import Unreadable, read_json
from hostos.machine.instance import Instance, Run, all_instances
from hostos.machine.kernel_command import EMULATED, compose
from hostos.machine.network import Forward
from hostos.machine.options import DEFAULT_CPUS, DEFAULT_MEMORY_MIB, UpOptions, check_memory, timeout_scale
from hostos.machine.os_image import OsImage
from hostos.machine.share import Share, check_shares

if TYPE_CHECKING:
    from hostos.machine.leases import LeaseFile


@dataclass(frozen=True)
class Plan:
    """A start, decided. `keys`: the user's authorized_keys lines."""

    options: UpOptions
    image: OsImage
    accelerator: accel.Choice
    hostname: str
    keys: tuple[str, ...]
    config: qemu.Config
    ssh_port: int
    swarm_port: int
    lease_sources: tuple[LeaseFile, ...] = ()


def make_plan(instance: Instance, options: UpOptions, keys: tuple[str, ...], *, memory: Memory | None = None) -> Plan:
    """Check everything that can be checked and decide the rest.

    What `options` leave open is as config.toml says; that is not remembered with them.

    Raises UserError for whatever cannot be started.
    """
    options.check()
    timeout_scale()
    remembered, options = options, options.over(configured.up_options())
    image, binary = choose_os(options)
    memory_mib = options.memory_mib or DEFAULT_MEMORY_MIB
    check_memory(memory_mib, image)
    check_root(options, image, memory_mib)
    hostname = options.hostname or instance.name
    check_hostname_is_free(instance, hostname)
    for forward in options.publish or ():
        if not network.is_free(forward.host_port, forward.protocol, forward.address):
            raise UserError(
                f"port {forward.address}:{forward.host_port}/{forward.protocol} is taken",
                f"publish another, or end what holds it ({who_listens()} shows it)",
            )
    choice = accel.choose(options.accel or "auto", image.arch)
    net = options.network
    sources, helper, daemon = check_network(instance, options)
    if net.own_address:
        ssh_port, swarm_port = network.SSH_PORT, network.SWARM_PORT
    else:
        ssh_port, swarm_port = choose_ports(options.publish or (), memory or Memory())
    disk, shares = check_devices(instance, options)
    identity = str(instance.directory)
    config = qemu.Config(
        binary=binary,
        name=instance.name,
        arch=image.arch,
        accelerator=choice.name,
        cpus=options.cpus or DEFAULT_CPUS,
        memory_mib=memory_mib,
        kernel=image.kernel(choice.name),
        initrd=instance.initrd,
        cmdline=_kernel_arguments(image, options, hostname, keys, choice),
        mac=network.mac_address(f"{identity} on {network.host_identity()}" if net.own_address else identity),
        forwards=() if net.own_address else forwards(ssh_port, swarm_port, options.publish or ()),
        serial_log=instance.serial_log,
        console_socket=instance.console_socket,
        monitor_socket=instance.monitor_socket,
        agent_socket=instance.agent_socket,
        pid_file=instance.pid_file,
        net=net,
        tap=net.name if net.kind == "tap" else bridge.tap_name(identity) if net.kind == "bridge" else "",
        bridge_helper=helper,
        vmnet_daemon=daemon,
        disk=disk,
        shares=shares,
        reclaim=bool(options.reclaim),
    )
    return Plan(remembered, image, choice, hostname, keys, config, ssh_port, swarm_port, sources)


def check_root(options: UpOptions, image: OsImage, memory_mib: int) -> None:
    """Raises UserError if this OS, on this machine, can't have an image as its root."""
    if not root.wanted(options):
        return
    if root.ABILITY not in image.mounts:
        raise UserError(f"{image.directory} cannot boot an image as its root", "one of this version can: invoke build")
    if memory_mib < root.MIN_MEMORY_MIB:
        raise UserError(
            f"{memory_mib} MiB of memory is too little for an image as root", f"--memory {root.MIN_MEMORY_MIB} or more"
        )
    if options.persist and options.disk in (None, "none"):
        raise UserError("--persist keeps changes on the machine's disk, and it has none", "--disk 20G")


def choose_os(options: UpOptions) -> tuple[OsImage, Path]:
    """What is booted, and the QEMU that runs it: as a directory or a kernel says, else for
    `options.arch`, else for this host's architecture. Raises UserError."""
    if options.kernel is None and options.os is None:
        # Without a QEMU nobody needs to be told how to build an OS.
        binary = qemu.find_qemu(options.arch or os_image.host_arch())
        return os_image.find(None, arch=options.arch), binary
    image = other_guest.load(options.kernel, options.initrd) if options.kernel else os_image.find(options.os)
    if options.arch not in (None, image.arch):
        raise UserError(
            f"{options.kernel or image.directory} is for {image.arch}, not for {options.arch}",
            "leave out --arch: what is booted says which machine it needs",
        )
    return image, qemu.find_qemu(image.arch)


def check_devices(instance: Instance, options: UpOptions) -> tuple[Disk | None, tuple[Share, ...]]:
    """The disk and the shares; raises UserError if one cannot be had."""
    disk = plan_disk(options.disk, instance.directory) if options.disk else None
    if disk is not None:
        for other, run in _others(instance):
            # One that is suspended goes on with what it has of the disk in its memory.
            suspended = (other.directory / "saved").is_dir()
            if run.disk and same_file(Path(run.disk), disk.file) and (suspended or other.process() is not None):
                raise UserError(
                    f"the disk {disk.file} is in use by machine {other.name!r}", f"hostos down -m {other.name}"
                )
    shares = options.shared
    check_shares(shares)
    return disk, shares


def check_network(instance: Instance, options: UpOptions) -> tuple[tuple[LeaseFile, ...], Path | None, Path | None]:
    """The lease files to watch, the bridge helper and the vmnet daemon that are needed; raises UserError
    if `options.network` cannot be had on this host."""
    net = options.network
    helper = daemon = None
    on: str | None = None
    if net.kind == "bridge":
        bridge.check_bridge(net.name)
        helper = bridge.find_helper(net.name)
        on = net.name
    elif net.kind == "tap":
        bridge.check_tap(net.name)
        _check_nobody_has(net.name, instance)
        on = bridge.bridge_of(net.name) or net.name
    elif net.kind == "vmnet":
        daemon = network.check_vmnet()
    if not net.own_address:
        return (), None, None
    from hostos.machine.leases import default_sources, named_source

    return tuple(named_source(text) for text in options.lease_files or ()) or default_sources(on), helper, daemon


def _check_nobody_has(tap: str, instance: Instance) -> None:
    """Raises UserError if another machine that runs uses this tap."""
    for other, run in _others_that_run(instance):
        if run.net == f"tap={tap}":
            raise UserError(f"tap {tap!r} is in use by machine {other.name!r}", "make one for each: ip tuntap add")


def _others(instance: Instance) -> Iterator[tuple[Instance, Run]]:
    """Every other machine that was ever started, with its last start."""
    for other in all_instances():
        with contextlib.suppress(Unreadable):
            run = None if other.name == instance.name else other.run()
            if run:
                yield other, run


def _others_that_run(instance: Instance) -> Iterator[tuple[Instance, Run]]:
    return ((other, run) for other, run in _others(instance) if other.process() is not None)


def _kernel_arguments(
    image: OsImage, options: UpOptions, hostname: str, keys: tuple[str, ...], choice: accel.Choice
) -> str:
    base = " ".join(word for word in (image.cmdline, options.append) if word)
    extra = [EMULATED[image.arch]] if choice.name == "tcg" else []
    if root.wanted(options):
        extra.append(root.arguments(options, timeout_scale()))
    if image.by_path:
        extra.append(other_guest.arguments(hostname, keys))
    return compose(base, hostname, keys, " ".join(extra))


@dataclass(frozen=True)
class Memory:
    """The ports of the last start, taken again where they are free."""

    ssh_port: int | None = None
    swarm_port: int | None = None


def choose_ports(publish: Iterable[Forward], memory: Memory) -> tuple[int, int]:
    """Ports of the host for the guest's sshd and for its BitTorrent client (TCP and UDP alike)."""
    reserved = frozenset(forward.host_port for forward in publish)
    ssh_port = network.choose_port("tcp", preferred=memory.ssh_port, but_not=reserved)
    swarm_port = network.choose_port("tcp", "udp", preferred=memory.swarm_port, but_not=reserved | {ssh_port})
    return ssh_port, swarm_port


def forwards(ssh_port: int, swarm_port: int, publish: Iterable[Forward]) -> tuple[Forward, ...]:
    return (
        Forward(ssh_port, network.SSH_PORT),
        Forward(swarm_port, network.SWARM_PORT),
        Forward(swarm_port, network.SWARM_PORT, "udp"),
        *publish,
    )


def check_hostname_is_free(instance: Instance, hostname: str) -> None:
    """Raises UserError if another machine that runs has this hostname."""
    for other, run in _others_that_run(instance):
        if run.hostname.lower() == hostname.lower():
            raise UserError(
                f"hostname {hostname!r} is taken: machine {other.name!r} runs with it",
                "choose another: --hostname NAME",
            )


def remembered_options(instance: Instance) -> UpOptions:
    """The options of the last start; raises Unreadable."""
    content = read_json(instance.config_file)
    return UpOptions() if content is None else UpOptions.from_json(content)
