"""What a container is made from, and the systemd-nspawn command line that runs it.

An image says what to run, as whom and where; everything that gives power (binds, network, more
capabilities) comes from the person who boots it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hostos.errors import UserError
from hostos.live.limits import NO_LIMITS, Limits
from hostos.live.manifest import BootConfig
from hostos.live.published import Port
from hostos.live.syscalls import IDS

FIRST_BASE, LAST_BASE = 0x00080000, 0x6FFF0000
"""Range of users that systemd-nspawn, too, hands out to containers (docs/live-boot.md)."""

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
"""It becomes the host name, so RFC 1123, and short enough for unit names and sockets."""

SIZE = re.compile(r"[1-9][0-9]{0,15}[kmg]?|[1-9][0-9]?%|100%", re.IGNORECASE)

Console = Literal["pipe", "interactive", "read-only"]
Network = Literal["none", "nat", "host"]
OnLoss = Literal["fail", "stop", "wait"]


def check_name(name: str) -> str:
    """The name itself if a container may have it. Raises UserError."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"not a usable container name: {name[:60]!r}",
            "use up to 40 lower-case letters, digits and '-', e.g. --name web-1",
        )
    return name


@dataclass(frozen=True)
class Bind:
    """A directory of the machine shown in the container; `shifted`: with owners like the image's.

    Without, everything in it belongs to nobody in the container.
    """

    source: str
    target: str
    read_only: bool = False
    shifted: bool = True


def parse_bind(text: str) -> Bind:
    """Reads `PATH[:CONTAINER-PATH][:ro]`; both absolute. A colon in a path is written `\\:`.

    Raises UserError.
    """
    how = "write --bind /PATH[:/CONTAINER/PATH][:ro]"
    parts = [part.replace("\\:", ":") for part in re.split(r"(?<!\\):", text)]
    read_only = len(parts) > 1 and parts[-1] in ("ro", "rw")
    mode = parts.pop() if read_only else "rw"
    source = parts[0]
    target = parts[1] if len(parts) > 1 else source
    for path in (source, target):
        if not path.startswith("/") or "\0" in path or "\n" in path or ".." in path.split("/"):
            raise UserError(f"not something to bind: {text[:100]!r}", how)
    if len(parts) > 2:
        raise UserError(f"not something to bind: {text[:100]!r} has too many parts", how)
    return Bind(source, target, mode == "ro")


@dataclass(frozen=True)
class Options:
    """What the person who boots a container chose. Construction checks it and raises UserError.

    `command`: argv instead of the image's; `init`: boot the image's init instead of any command;
    `upper_size`: room for what the container writes; `persist`: the name under which that is kept;
    `on_loss`: what happens when nobody has what it reads: the read fails by its deadline, it is stopped then,
    or the read waits for as long as it takes;
    `publish`: ports of its network that the machine listens on; `limits`: what it may take of the machine;
    `nspawn`: options passed on as they are.
    """

    name: str
    command: tuple[str, ...] = ()
    init: bool = False
    console: Console = "pipe"
    binds: tuple[Bind, ...] = ()
    nspawn: tuple[str, ...] = ()
    network: Network = "none"
    read_only: bool = False
    private_users: bool = True
    upper_size: str = "50%"
    limits: Limits = NO_LIMITS
    persist: str = ""
    publish: tuple[Port, ...] = ()
    on_loss: OnLoss = "fail"

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.publish and self.network != "nat":
            raise UserError(
                f"with --network {self.network} there is nothing to publish",
                "leave --publish out, or take --network nat",
            )
        if self.persist:
            check_name(self.persist)
        if not SIZE.fullmatch(self.upper_size):
            raise UserError(f"not a size: {self.upper_size[:40]!r}", "write e.g. 256m, 2g or 50% (of the memory)")
        for option in self.nspawn:
            if not option.startswith("-") or option == "--":
                raise UserError(f"not an option of systemd-nspawn: {option[:80]!r}", "write each as --option=value")
        for word in (*self.command, *self.nspawn):
            if "\0" in word:
                raise UserError("an argument contains a NUL byte")


def nspawn_argv(
    options: Options,
    boot: BootConfig,
    root: str,
    base: int | None,
    network: str = "",
    init_arguments: Sequence[str] = (),
) -> list[str]:
    """The systemd-nspawn command line.

    `boot`: what the image asks for; `root`: the mounted tree; `base`: first user of its range
    (None: no user namespace); `network`: the namespace of its own network; `init_arguments`: for its init.
    The command of `options` replaces the image's.
    """
    argv = [
        # nspawn itself could not join it any more once it is in the container's user namespace.
        *(["nsenter", f"-n{network}", "--"] if options.network == "nat" else []),
        "systemd-nspawn",
        "--quiet",
        "--settings=no",  # no *.nspawn file may change what was asked for
        "--register=no",
        "--keep-unit",
        f"--machine={options.name}",
        f"--directory={root}",
        f"--console={options.console}",
        "--link-journal=no",
        "--timezone=off",
    ]
    if base is None:
        argv.append("--private-users=no")
    else:
        # The tree is shifted already (id-mapped mounts); nspawn's own chown would copy it whole.
        argv += [f"--private-users={base}:{IDS}", "--private-users-ownership=no"]
    if options.network == "none":
        argv += ["--private-network", "--resolv-conf=off"]
    else:
        argv.append("--resolv-conf=replace-host")
    if options.read_only:
        argv.append("--read-only")
    for bind in options.binds:
        option = "--bind-ro" if bind.read_only else "--bind"
        shifted = ":idmap" if base is not None and bind.shifted else ""
        argv.append(f"{option}={_escape(bind.source)}:{_escape(bind.target)}{shifted}")
    if options.init:
        return [*argv, "--notify-ready=yes", *options.nspawn, "--boot", *init_arguments]
    argv.append("--as-pid2")  # ordinary programs don't reap orphans, nor die by SIGTERM as PID 1
    argv += [f"--setenv={key}={value}" for key, value in boot.env]
    if boot.user:
        argv.append(f"--user={boot.user.partition(':')[0]}")  # nspawn takes the user's own groups
    if boot.workdir:
        argv.append(f"--chdir={boot.workdir}")
    argv += options.nspawn
    return [*argv, "--", *(options.command or boot.command)]


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:")


def run_script(argv: list[str], announce: str) -> str:
    """A shell script that runs `argv` in place, after writing its process id to the FIFO `announce`.

    One file for both ways of starting a container (a scope, a unit), and for people to read. The
    FIFO is opened for reading too, so that nothing waits if nobody listens any more.
    """
    fifo = shlex.quote(announce)
    lines = (
        "#!/bin/sh",
        # nspawn would colour the terminal and change its title.
        "export SYSTEMD_TINT_BACKGROUND=0 SYSTEMD_ADJUST_TERMINAL_TITLE=0",
        f"exec 3<>{fifo}",
        "echo $$ >&3",
        "exec 3>&-",
        f"exec {shlex.join(argv)}",
    )
    return "\n".join(lines) + "\n"


def scope_argv(name: str, script: str, limits: Limits) -> list[str]:
    """Runs the script in a scope of its own, with this terminal; needs no D-Bus."""
    return [
        "systemd-run",
        "--scope",
        "--quiet",
        "--collect",
        f"--unit=hostos-container-{name}",
        "--slice=hostos-containers.slice",
        *(f"--property={each}" for each in limits.properties()),
        "--",
        "/bin/sh",
        script,
    ]


def unit_name(name: str) -> str:
    return f"hostos-container@{name}.service"


def unit_limits(name: str) -> Path:
    """Where systemd looks for what is special about this container's unit."""
    return Path("/run/systemd/system") / f"{unit_name(name)}.d" / "limits.conf"


def enter_argv(leader: int, command: list[str], term: str = "") -> list[str]:
    """Runs a command in a running container: all namespaces of its first process, root in there.

    The network comes first: with NAT it belongs to the guest, and whoever is root of the container alone
    may not enter it. BusyBox's nsenter enters the user namespace before the others. The process counts as
    one of whoever asked for it, and ends with the container.
    """
    environment = [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME=/root",
        "USER=root",
        "container=systemd-nspawn",
        *([f"TERM={term}"] if term else []),
    ]
    return [
        "env",
        "-i",
        *environment,
        # Short options: a guest may have BusyBox's.
        *("nsenter", "-t", str(leader), "-n", "--"),
        # User, mount, UTS, IPC and PID namespaces, then its root and working directory.
        *("nsenter", "-t", str(leader), "-U", "-m", "-u", "-i", "-p", "-r", "-w", "--"),
        *command,
    ]


SHELL = ["/bin/sh", "-c", "if command -v bash >/dev/null 2>&1; then exec bash -l; else exec sh -l; fi"]
"""The container's best shell."""


def free_base(used: set[int]) -> int:
    """The first user range no container has. Raises UserError when there is none left."""
    for base in range(FIRST_BASE, LAST_BASE + 1, IDS):
        if base not in used:
            return base
    raise UserError("every range of users is in use by a container", "stop one: hostos container stop NAME")
