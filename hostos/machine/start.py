"""One start of a machine: booted, or loaded from its template."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hostos.errors import UserError, failure
from hostos.machine import accel, configured, devices, other_guest, qemu, root, stop
from hostos.machine.clone import CloneFailed
from hostos.machine.disk import prepare
from hostos.machine.identity import Identity, combine_initrd, ensure_identity, instance_archive
from hostos.machine.instance import Instance, Run
from hostos.machine.network import LOOPBACK, address_towards
from hostos.machine.options import timeout_scale
from hostos.machine.plan import Plan
from hostos.machine.process import QemuProcess, spawn
from hostos.machine.readiness import Target, climb, log_in
from hostos.machine.ssh import write_ssh_config
from hostos.machine.template import Template, mark_used
from hostos.machine.watch import Watch
from hostos.steps import Event, Steps

if TYPE_CHECKING:
    from hostos.machine.leases import Found

# An emulated guest on a loaded host is given this many times as long.
_TCG_PATIENCE = 4.0
# A clone has nothing to start any more: what takes longer has gone wrong, and booting is quicker.
_CLONE_SECONDS = 8.0


def boot(instance: Instance, plan: Plan, steps: Steps, began: float) -> Run:
    """Boot it; whatever goes wrong, QEMU is gone and the logs are there when it raises."""
    stages = _Stages()
    steps = Steps(steps.emit, stages)
    factor = timeout_scale() * (_TCG_PATIENCE if plan.accelerator.name == "tcg" else 1.0)
    proof = plan.accelerator.name != "tcg"
    deadlines = configured.deadlines(proof=proof, total=plan.options.timeout).scaled(factor)

    if not plan.image.mounts and (plan.config.disk or plan.config.shares):
        steps.warning("this OS mounts neither disk nor shares by itself (one of this version does: invoke build)")
    with contextlib.ExitStack() as undo:
        undo.callback(stop.end, instance)
        with steps.step("QEMU started") as step:
            identity = make_files(instance, plan)
            instance.serial_log.unlink(missing_ok=True)
            command = qemu.command(plan.config)
            process = _spawn(command, instance)
            run = _run_record(plan, command, process, began)
            instance.write_run(run)
            _details(plan, command, steps)
            steps.detail(f"seconds each stage may take: {deadlines}")
            step.detail = f"{plan.accelerator.name}, {plan.config.cpus} CPUs, {plan.config.memory_mib} MiB"
        config = plan.config
        locator = None
        if config.net.own_address:
            from hostos.machine.address import Locator

            locator = Locator(plan.lease_sources, config.mac, plan.hostname)

        def found(new: Found) -> None:
            nonlocal run
            address = new.lease.address
            run = replace(run, guest_address=address, host_address=address_towards(address), found_by=new.source)
            instance.write_run(run)
            write_ssh_config(instance, identity, plan.ssh_port)

        if config.net.kind == "bridge" and config.bridge_helper is None:
            from hostos.machine import bridge

            bridge.connect(config.tap, config.net.name, config.mac, process.alive)
        watch = Watch(instance, process, deadlines.total)
        announced = "network" in plan.image.announces
        if plan.image.by_path:
            outcome = other_guest.climb(instance, identity, watch, plan.ssh_port, deadlines, steps)
            failed_units = outcome.failed_units
            run = replace(run, reached=outcome.reached)
        else:
            failed_units = climb(
                instance,
                identity,
                watch,
                plan.ssh_port,
                deadlines,
                steps,
                announced=announced,
                locator=locator,
                found=found,
                root=root.wanted(plan.options),
            )
        # QEMU has it in memory.
        instance.initrd.unlink(missing_ok=True)
        for unit in failed_units:
            steps.warning(f"{unit} failed in the guest: hostos ssh -m {instance.name} -- journalctl -u {unit}")
        if plan.accelerator.fault or plan.accelerator.name == "kvm":
            # Only now is it certain that nothing but the accelerator was at fault.
            accel.remember_fault(plan.accelerator.fault)
        run = instance.mark_ready(run, time.time(), stages.done, failed_units)
        undo.pop_all()
    return run


def clone(instance: Instance, plan: Plan, template: Template, steps: Steps, began: float) -> Run:
    """Load it from `template`; whatever goes wrong, QEMU is gone and the logs are there.

    Raises CloneFailed if it should be booted instead, and whatever `boot` raises.
    """
    from hostos.machine import clone as cloning

    stages = _Stages()
    steps = Steps(steps.emit, stages)
    with contextlib.ExitStack() as undo:
        undo.callback(stop.end, instance)
        with steps.step("QEMU started") as step:
            identity = ensure_identity(instance.identity_dir, instance.name)
            instance.make_socket_dir()
            write_ssh_config(instance, identity, plan.ssh_port)
            instance.serial_log.unlink(missing_ok=True)
            config = cloning.cloning(plan.config, template)
            command = qemu.command(config)
            process = _spawn(command, instance)
            # It takes as long as the guest takes to load, so beside that.
            threading.Thread(target=_import_ssh, daemon=True).start()
            run = replace(_run_record(plan, command, process, began), template=template.key)
            instance.write_run(run)
            _details(plan, command, steps)
            step.detail = f"{plan.accelerator.name}, {plan.config.cpus} CPUs, {plan.config.memory_mib} MiB"
        watch = Watch(instance, process, plan.options.timeout)
        who = cloning.person(identity, plan.hostname, plan.config.mac, plan.keys)
        try:
            cloning.take_over(config, template, process, who, steps)
            seconds = _CLONE_SECONDS * timeout_scale() * _TCG_PATIENCE
            target = Target(LOOPBACK, plan.ssh_port)
            target.prompt = True
            log_in(target, identity, watch, time.monotonic() + seconds, seconds, steps).close()
        except (CloneFailed, UserError) as error:
            # A port that was taken, a QEMU that somebody killed: not the template's fault.
            fault = watch.fault()
            if fault is not None:
                raise fault from error
            if isinstance(error, CloneFailed) or not watch.out_of_time():
                raise CloneFailed(str(error).splitlines()[0]) from error
            raise
        run = instance.mark_ready(run, time.time(), stages.done, [])
        mark_used(template)
        undo.pop_all()
    return run


@dataclass
class _Stages:
    """What took how long, for `run.json`."""

    done: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if event.kind == "done":
            self.done.append({"name": event.step, "seconds": round(event.seconds, 3)})


def make_files(instance: Instance, plan: Plan, *, dry: bool = False) -> Identity:
    """What QEMU's command line names and what leads into the guest afterwards. `dry`: nothing is started."""
    identity = ensure_identity(instance.identity_dir, instance.name)
    instance.make_socket_dir()
    mounts = devices.lines(plan.config.disk, plan.config.shares)
    image = None
    if root.wanted(plan.options):
        image = root.archive(plan.options, own_address=plan.config.net.own_address, start=not dry)
    archive = instance_archive(identity, plan.hostname, plan.keys, mounts, image)
    combine_initrd(plan.image.initrd(plan.config.memory_mib), archive, instance.initrd)
    if plan.config.disk is not None:
        prepare(plan.config.disk)
    write_ssh_config(instance, identity, plan.ssh_port)
    return identity


def _import_ssh() -> None:
    from hostos.machine import connection  # noqa: F401


def _details(plan: Plan, command: list[str], steps: Steps) -> None:
    steps.detail(f"accelerator {plan.accelerator.name}: {plan.accelerator.reason}")
    steps.detail(f"OS {plan.image.directory}, Linux {plan.image.kernel_version}")
    steps.detail(qemu.shell_text(command))


def _spawn(command: list[str], instance: Instance) -> QemuProcess:
    try:
        return spawn(command, instance.qemu_log)
    except OSError as error:
        raise failure(f"QEMU cannot be started: {error}") from error


def _run_record(plan: Plan, command: list[str], process: QemuProcess, began: float) -> Run:
    return Run(
        pid=process.pid,
        process_start=process.start,
        started_at=began,
        hostname=plan.hostname,
        ssh_port=plan.ssh_port,
        swarm_port=plan.swarm_port,
        accelerator=plan.accelerator.name,
        accelerator_reason=plan.accelerator.reason,
        cpus=plan.config.cpus,
        memory_mib=plan.config.memory_mib,
        os_directory=str(plan.image.directory),
        kernel_version=plan.image.kernel_version,
        command=command,
        publish=[asdict(forward) for forward in plan.options.publish or ()],
        net=str(plan.config.net),
        mac=plan.config.mac if plan.config.net.own_address else "",
        lease_files=[source.spec for source in plan.lease_sources],
        disk=str(plan.config.disk.file) if plan.config.disk else "",
        shares=[str(share) for share in plan.config.shares],
        reclaim=plan.config.reclaim,
        root=plan.options.root or "" if root.wanted(plan.options) else "",
        persist=bool(plan.options.persist),
        arch=plan.config.arch,
    )
