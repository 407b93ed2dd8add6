"""Bringing machines up and down."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

from hostos.errors import UserError, failure
from hostos.hostsystem import who_listens
from hostos.machine import accel, configured, qemu, root, start, stop, suspend, template
from hostos.machine.clone import CloneFailed
from hostos.machine.files import Unreadable, write_json
from hostos.machine.guard import at_work, file_faults, unwinding_on_signals
from hostos.machine.identity import existing_user_key, user_key_pair
from hostos.machine.instance import Instance, Run
from hostos.machine.options import UpOptions
from hostos.machine.plan import Memory, Plan, choose_os, choose_ports, forwards, make_plan, remembered_options
from hostos.machine.readiness import AcceleratorFailed
from hostos.machine.stop import Stopped
from hostos.machine.template import Template
from hostos.machine.watch import PortTaken
from hostos.steps import Steps

__all__ = ["Stopped", "UpOptions", "down", "dry_run", "ensure_up", "kill", "up"]

_PORT_ATTEMPTS = 5
# One clone in some hundred was seen to stay silent, for a reason not found; the next one from the same template speaks.
_CLONE_ATTEMPTS = 2
# How long ensure_up waits for another command that is at work on the machine.
_WAIT_FOR_OTHERS = 300.0


def up(name: str, options: UpOptions, steps: Steps) -> Instance:
    """Start machine `name` and wait until it is ready.

    What `options` leave open is as it was last time, else the default. If the start fails or is
    interrupted, nothing is left running. Raises UserError: status 2 if it was not begun (bad
    options, already running), 1 if it failed.
    """
    instance = Instance.named(name)
    _refuse_running(instance)
    # Checked before anything is made: bad input changes nothing.
    _plan(instance, options, steps)
    instance.make_directory()
    with at_work(instance, "up"):
        _refuse_running(instance, locked=True)
        start_or_resume(instance, options, steps)
    return instance


def ensure_up(name: str, steps: Steps, options: UpOptions | None = None) -> Instance:
    """Machine `name`, running: started (and said so) if it is not.

    `options` are for a start only. Waits if another command is starting it. Raises UserError.
    """
    instance = Instance.named(name)
    if instance.exists() and instance.state()[0] == "running":
        return instance
    if not instance.exists():
        _plan(instance, options or UpOptions(), steps)
    instance.make_directory()
    with at_work(instance, "up", wait=_WAIT_FOR_OTHERS):
        if instance.state(locked=True)[0] != "running":
            _refuse_running(instance, locked=True)
            steps.note(f"machine {name!r} is not running: starting it")
            start_or_resume(instance, options or UpOptions(), steps)
    return instance


def architecture(name: str) -> str:
    """The architecture of machine `name`, or the one `up` would start it with now. Raises UserError."""
    instance = Instance.named(name)
    options = UpOptions()
    if instance.exists():
        if instance.state()[0] == "running":
            return instance.require_run().architecture
        with contextlib.suppress(Unreadable):
            options = remembered_options(instance)
    return choose_os(options.over(configured.up_options()))[0].arch


def dry_run(name: str, options: UpOptions, steps: Steps) -> list[str]:
    """The QEMU command line `up` would run now; it runs as it is.

    For that its files are made: directories, keys, and the initrd (the OS's, followed by this
    machine's archive). Nothing is started, and no options are remembered. Raises UserError.
    """
    instance = Instance.named(name)
    plan = _plan(instance, options, steps)
    if instance.exists() and instance.process() is not None:
        steps.note(f"machine {name!r} is running: until it has ended, this command finds its files and ports in use")
        return qemu.command(plan.config)
    instance.make_directory()
    with at_work(instance, "up"), contextlib.ExitStack() as undo:
        _refuse_running(instance, locked=True)
        undo.callback(stop.tidy, instance)
        plan = _with_keys(instance, plan)
        identity = start.make_files(instance, plan, dry=True)
        undo.pop_all()
    steps.note(f"its files are in {instance.directory}. Once it runs: ssh -F {instance.ssh_config} {identity.alias}")
    return qemu.command(plan.config)


def down(name: str, steps: Steps, *, timeout: float = stop.POWER_OFF_SECONDS) -> Stopped:
    """Power machine `name` off; raises UserError (status 2) if there is nothing to power off."""
    instance = Instance.load(name)
    with at_work(instance, "down"):
        if instance.saved.is_dir():
            raise UserError(
                f"machine {name!r} is suspended", f"hostos resume -m {name}, or hostos rm --force -m {name}"
            )
        process = instance.process()
        if process is None:
            # A QEMU that was started a moment ago may not have written its pid file.
            if stop.end(instance):
                return Stopped("SIGKILL", False, 0.0)
            raise UserError(f"machine {name!r} is not running", "hostos ls shows all machines")
        return stop.stop(instance, process, steps, timeout=timeout)


def kill(name: str) -> list[int]:
    """End machine `name` at once, whatever it does, and a start of it that is under way.

    Returns the pids of the QEMU processes. Raises UserError (status 2) if there was none.
    """
    instance = Instance.load(name)
    killed = stop.end(instance)
    if not killed:
        raise UserError(f"machine {name!r} is not running", "hostos ls shows all machines")
    return killed


def start_or_resume(instance: Instance, options: UpOptions, steps: Steps) -> None:
    """Start `instance`, or bring it back if it is suspended (`--cold`: discard that, and say so).

    The caller holds the lock. Raises UserError.
    """
    if instance.state(locked=True)[0] != "suspended":
        _start(instance, options, steps)
        return
    if options.warm is False:
        suspend.discard(instance, steps)
        _start(instance, options, steps)
        return
    asked = replace(options, timeout=None, warm=None)
    with contextlib.suppress(Unreadable):
        remembered = remembered_options(instance)
        if asked.over(remembered) != remembered:
            option = "" if instance.name == "default" else f" -m {instance.name}"
            raise UserError(
                f"machine {instance.name!r} is suspended: it comes back as it was, not with other options",
                f"hostos resume{option}; or discard what it was doing: hostos up --cold{option}",
            )
    suspend.resume(instance, steps)


def _refuse_running(instance: Instance, *, locked: bool = False) -> None:
    if not instance.exists():
        return
    state, why = instance.state(locked=locked)
    option = "" if instance.name == "default" else f" -m {instance.name}"
    if state == "running":
        raise UserError(
            f"machine {instance.name!r} is running already", f"use it: hostos ssh{option}; end it: hostos down{option}"
        )
    if state in ("starting", "stopping"):
        raise UserError(f"machine {instance.name!r} is {state} ({why})", f"hostos status{option}")
    if state == "unresponsive":
        # It may come back, and what is in it with it: ending it is for the user to decide.
        raise UserError(f"machine {instance.name!r} runs but {why}", f"wait, or end it: hostos kill{option}")


def _plan(instance: Instance, options: UpOptions, steps: Steps) -> Plan:
    memory = Memory()
    with contextlib.suppress(Unreadable):
        run = instance.run()
        if run and run.net == "user":
            memory = Memory(run.ssh_port, run.swarm_port)
    try:
        options = options.over(remembered_options(instance))
    except Unreadable as error:
        steps.warning(f"{error}; starting from the defaults")
    keys = options.keys or configured.up_options().keys
    if not keys:
        made = existing_user_key()
        keys = (made,) if made else ()
    return make_plan(instance, options, keys, memory=memory)


def _start(instance: Instance, options: UpOptions, steps: Steps) -> Run:
    """Start it; if that fails or is interrupted, nothing is left of it."""
    began = time.time()
    if stop.end(instance):
        steps.note(f"ended what an interrupted start of {instance.name!r} had left running")
    with contextlib.ExitStack() as undo:
        undo.callback(stop.end, instance)
        plan = _with_keys(instance, _plan(instance, options, steps))
        write_json(instance.config_file, plan.options.to_json())
        _say_accelerator(plan, steps)
        origin, bake_later = _origin(plan, steps)
        run = _persist(instance, plan, origin, steps, began)
        undo.pop_all()
    if bake_later:
        _bake_later(instance.name, plan)
    return run


def _persist(instance: Instance, plan: Plan, origin: Template | None, steps: Steps, began: float) -> Run:
    """Start it, again if a port was taken meanwhile, the template is of no use or KVM turns out not to work."""
    ports_tried = clones_failed = 0
    while True:
        try:
            if origin:
                return start.clone(instance, plan, origin, steps, began)
            return start.boot(instance, plan, steps, began)
        except CloneFailed as failed:
            assert origin is not None
            clones_failed += 1
            if clones_failed < _CLONE_ATTEMPTS:
                steps.warning(f"the template did not come to life ({failed}): once more")
                continue
            template.mark_failed(origin, str(failed))
            steps.warning(
                f"the template could not be used ({failed}): booting instead. It is not tried again; "
                "hostos up --warm makes a new one"
            )
            origin = None
        except PortTaken as taken:
            if any(
                (each.protocol, each.host_port) == (taken.protocol, taken.port) for each in plan.options.publish or ()
            ):
                raise UserError(f"port {taken.port}/{taken.protocol} is taken", "publish another") from taken
            ports_tried += 1
            if ports_tried >= _PORT_ATTEMPTS:
                hint = f"see who takes them: {who_listens()}"
                raise failure(f"{taken}, {ports_tried} times in a row", hint) from taken
            steps.note(f"{taken}: choosing another")
            ssh_port, swarm_port = choose_ports(plan.options.publish or (), Memory())
            publish = plan.options.publish or ()
            config = replace(plan.config, forwards=forwards(ssh_port, swarm_port, publish))
            plan = replace(plan, config=config, ssh_port=ssh_port, swarm_port=swarm_port)
        except AcceleratorFailed as error:
            broken = plan.accelerator.name.upper()
            if not plan.accelerator.fallback:
                raise failure(f"{broken} does not run guests here: {error}", "use --accel auto, or tcg") from error
            fault = f"it creates a VM whose guest never runs ({error})"
            choice = accel.Choice("tcg", f"{broken} cannot be used: {fault}", fault=fault)
            config = replace(plan.config, accelerator="tcg", kernel=plan.image.kernel("tcg"))
            plan = replace(plan, accelerator=choice, config=config)
            _say_accelerator(plan, steps)


def _origin(plan: Plan, steps: Steps) -> tuple[Template | None, bool]:
    """The template to start from, if any, and whether one should be made once the machine has booted.

    Raises UserError if one is insisted upon (`--warm`) and there can be none.
    """
    insisted = plan.options.warm
    if insisted is False or (insisted is None and not (template.enabled() and configured.warm())):
        return None, False
    why = template.why_not(plan.config, plan.image)
    if root.wanted(plan.options):
        why = "the root is mounted when it boots"
    if plan.options.append:
        why = "words given with --append are read by a kernel that boots"
    if why:
        if insisted:
            raise UserError(f"there can be no warm start: {why}", "start it without --warm")
        return None, False
    key = template.key_of(plan.config, plan.image)
    found = template.find(key)
    if found is not None and not found.failed:
        return found, False
    if not insisted:
        # One that has failed would fail again; only who asks for it gets a new one.
        return None, found is None
    steps.note("there is no template for such a machine yet: making one")
    from hostos.machine import bake

    return bake.bake(plan.config, plan.image, steps, wait=_WAIT_FOR_OTHERS), False


def _bake_later(name: str, plan: Plan) -> None:
    from hostos.machine import bake

    bake.in_the_background(name, plan.image.directory)


def bake_template(name: str, options: UpOptions, steps: Steps, *, force: bool = False, wait: float = 0.0) -> Template:
    """Make the template for machines like `name` (with `options`), if there is none or `force`.

    Raises UserError.
    """
    from hostos.machine import bake

    instance = Instance.named(name)
    plan = _plan(instance, replace(options, publish=()), steps)
    with file_faults(instance), unwinding_on_signals():
        return bake.bake(plan.config, plan.image, steps, force=force, wait=wait)


def _with_keys(instance: Instance, plan: Plan) -> Plan:
    """`plan`, with our own key pair if the user has given no key."""
    if plan.keys:
        return plan
    pair = user_key_pair()
    return make_plan(instance, plan.options, (pair.line,), memory=Memory(plan.ssh_port, plan.swarm_port))


def _say_accelerator(plan: Plan, steps: Steps) -> None:
    choice = plan.accelerator
    if choice.name == "tcg" and choice.reason != "asked for":
        steps.warning(f"running under TCG, {accel.SLOWDOWN}. {choice.reason}")
