"""`python3 -m hostos.live.root`: the client of a machine whose root is an image (docs/root.md).

Started by the machine's first process (overlay/usr/lib/hostos/root), which waits for the answer in a FIFO and then
becomes the image's init. This process stays below it and serves its root: it has the initial file system as its
own root, reads nothing that it serves, and its name begins with "@", so that systemd leaves it alive to the end.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from hostos.errors import UserError, failure
from hostos.live import root_files
from hostos.live.cid import looks_like_cid
from hostos.live.cid import parse as parse_cid
from hostos.live.container import Options
from hostos.live.daemon import Config, run
from hostos.live.inside import Inside
from hostos.live.kept import DISK, Store
from hostos.live.mounts import in_thread
from hostos.live.operations import Operations
from hostos.live.running import Container
from hostos.live.schedule import REST_OFF, Rest
from hostos.live.torrents import parse_image_reference, parse_peer
from hostos.live.url import parse_gateway

NAME = "root"
"""As which the client knows it: `hostos container stats root`."""
DEADLINE = 60.0
"""Seconds for an address, and again for the image and its first blocks; hostos.deadline= sets another."""
READ_DEADLINE = 900.0
"""Seconds for each later read. A root that gets an error for an answer is broken; better it stands still while
its peers are away. The next read tries again, of course."""
RETRY = 5.0
CONSOLES = Path("/sys/class/tty/console/active")
RUN = Path("/run/hostos")
HANDED_OVER = Path("/proc/1/root")
"""Where the root is found from here on: it is mounted over this system, below which nothing can be seen."""
READ_LATER = (30.0, 120.0, 600.0)
"""Seconds after the start at which what it takes to power off is fetched, so that it works without peers, too: a
system takes its time to start what it will have to end. What is here already is not fetched again."""
TO_POWER_OFF = (
    "usr/lib/systemd/systemd-shutdown",
    "usr/bin/systemctl",
    "usr/bin/umount",
    "usr/lib/systemd/systemd-executor",
    "usr/lib/systemd/systemd-random-seed",
    "usr/lib/systemd/systemd-update-utmp",
    "usr/lib/systemd/systemd-user-sessions",
    *(
        f"usr/lib/systemd/system/{unit}"
        for unit in (
            "poweroff.target",
            "systemd-poweroff.service",
            "reboot.target",
            "systemd-reboot.service",
            "shutdown.target",
            "final.target",
            "umount.target",
        )
    ),
    *(f"usr/lib/systemd/user/{unit}" for unit in ("exit.target", "systemd-exit.service", "shutdown.target")),
)
MOST_OF_A_PROGRAM = 16 << 20
"""Bytes of each running program and library that are fetched, too: how it ends, it has never run before."""


@dataclass(frozen=True)
class Wanted:
    """What to boot. `peers` (or gateways, of a CID): who may have it; `persist`: its changes are kept on the
    machine's disk; `rest`: whether all of it is fetched in the end; `deadline`: seconds, see `DEADLINE`; `trace`:
    each read is noted, and nothing is fetched ahead."""

    image: str
    peers: tuple[str, ...]
    persist: bool = False
    rest: Rest = REST_OFF
    deadline: float = DEADLINE
    trace: bool = False


def parse(command_line: str, more: Iterable[str] = ()) -> Wanted:
    """What the kernel command line, and the words the launcher brought, ask for. Raises UserError."""
    line, _, _ = f" {command_line} ".replace("\n", " ").partition(" -- ")
    image, peers, persist, rest, deadline, trace = "", [], False, REST_OFF, DEADLINE, False
    for word in (*line.split(), *more):
        name, _, value = word.partition("=")
        match name:
            case "hostos.root":
                image = value
            case "hostos.peer" | "hostos.gateway":
                peers.append(value)
            case "hostos.persist":
                persist = value not in ("0", "no", "off")
            case "hostos.trace":
                trace = value not in ("0", "no", "off")
            case "hostos.complete":
                rest = Rest.parse(value)
            case "hostos.deadline":
                try:
                    deadline = min(max(float(value), 1.0), 86400.0)
                except ValueError:
                    raise UserError(f"hostos.deadline={value[:20]} is no number of seconds") from None
    if not image:
        raise UserError("hostos.root= names no image", "hostos.root=<hash>")
    if looks_like_cid(image):
        gateways = tuple(str(parse_gateway(each)) for each in peers)
        return Wanted(str(parse_cid(image)), gateways, persist, rest, deadline, trace)
    reference = parse_image_reference(image)
    named = tuple(dict.fromkeys((*(parse_peer(each) for each in peers), *reference.peers)))
    return Wanted(reference.info_hash, named, persist, rest, deadline, trace)


def say(text: str) -> None:
    """On every console, and to the launcher, which reads one of them (hostos.machine.root)."""
    flat = " ".join(text.split())[:900]
    with suppress(OSError):
        # An error's priority: anything less is not shown with "quiet".
        with Path("/dev/kmsg").open("wb", buffering=0) as log:
            log.write(f"<3>hostos: root: {flat}\n".encode())


class Root:
    """The way from a hash to a mounted root that the first process can go on in."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.began = time.monotonic()

    async def mount(self, operations: Operations) -> None:
        """Try until it is mounted, then hand it over. Who waits is told why it takes so long."""
        while True:
            try:
                container = await self._try(operations)
                break
            except (UserError, OSError) as error:
                say(_failed(error))
            await trio.sleep(RETRY)
        # Opened while its path still leads there.
        root = Inside(container.root)
        init = root.program(*root_files.INITS)
        say(f"mounted after {time.monotonic() - self.began:.1f} s, starting /{init}")
        (RUN / "root.mounted").touch()
        await in_thread(_hand_over, RUN / "root.fifo", f"/{init} {container.root}\n")
        container.root, container.is_system = HANDED_OVER, True
        began = trio.current_time()
        for later in READ_LATER:
            await trio.sleep_until(began + later)
            await in_thread(_read_all, root)
        root.close()

    async def _try(self, operations: Operations) -> Container:
        """Raises UserError, OSError."""
        wanted = self.wanted
        if wanted.persist:
            if not DISK.is_mount():
                raise failure("there is no disk to keep changes on", "give the machine one: hostos up --disk 20G")
            operations.containers.kept = Store(DISK / "roots")
        await self._network()
        say(f"looking for image {wanted.image[:16]}, asking {', '.join(wanted.peers) or 'nobody'}")
        options = Options(
            name=NAME,
            # By its boot trace, too.
            init=True,
            private_users=False,
            # A name of its own for each image: its changes make sense over no other.
            persist=wanted.image[:32].lower() if wanted.persist else "",
        )

        async def tell(event: dict[str, Any]) -> None:
            say(f"{event['name']} after {time.monotonic() - self.began:.1f} s")

        container = await operations.containers.prepare(
            options,
            wanted.image,
            wanted.peers,
            tell,
            bundle=_brought(root_files.INSTANCE / "image"),
            deadline=wanted.deadline,
            read_deadline=READ_DEADLINE,
            only_mount=True,
            rest=wanted.rest,
            trace=wanted.trace,
        )
        try:
            await in_thread(self._prepare, container.root)
        except BaseException:
            container.given_up.set()
            with trio.CancelScope(shield=True):
                await container.ended.wait()
            raise
        return container

    async def _network(self) -> None:
        """Wait for an address. Raises UserError."""
        with trio.move_on_after(self.wanted.deadline):
            while not (RUN / "uplink").exists():
                await trio.sleep(0.1)
            return
        cards = [path.parent.name for path in Path("/sys/class/net").glob("*/device")]
        what = f"no DHCP lease on {', '.join(sorted(cards))}" if cards else "no network card was found"
        raise failure(f"no network: {what} within {self.wanted.deadline:g} s")

    def _prepare(self, place: Path) -> None:
        """Make the image able to be this machine's system. Raises UserError, OSError."""
        with Inside(place) as root:
            if not root.program(*root_files.INITS):
                raise failure("the image has no init to boot", "it needs systemd-sysv, or another init in /sbin/init")
            from_launcher = (root_files.INSTANCE / "authorized_keys").exists()
            if from_launcher and not root.program(*root_files.SSH_SERVERS):
                raise failure("the image has no SSH server, so nobody could get in", "add openssh-server to it")
            try:
                root_files.mount_kernel_file_systems(root)
                root_files.identify(root, kept=self.wanted.persist)
                if not self.wanted.persist:
                    root_files.up_to_date(root)
                root_files.give_console(root, CONSOLES.read_text())
                servers = [
                    line.split()[1]
                    for line in (RUN / "resolv.conf").read_text().splitlines()
                    if line.startswith("nameserver ")
                ]
                root_files.keep_network(root, (RUN / "uplink").read_text().strip(), servers)
                with suppress(FileNotFoundError):
                    devices = (root_files.INSTANCE / "devices").read_text(errors="surrogateescape")
                    root_files.mount_shares(root, devices)
            except OSError as error:
                raise failure(f"the image cannot be prepared: {error}") from None


def _failed(error: UserError | OSError) -> str:
    """What the launcher takes apart again (hostos.machine.root)."""
    if isinstance(error, UserError):
        return f"failed: {error.message}" + (f" (hint: {error.hint})" if error.hint else "")
    return f"failed: {error}"


def _brought(path: Path) -> dict[str, Any] | None:
    """The image's metadata, where the launcher brought it. It is proved before it is used."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _hand_over(fifo: Path, answer: str) -> None:
    with fifo.open("w") as stream:
        stream.write(answer)


def _read_all(root: Inside) -> None:
    for path in dict.fromkeys((*TO_POWER_OFF, *running_programs())):
        with suppress(OSError):
            root.fetch(path, MOST_OF_A_PROGRAM)


def running_programs(proc: Path = Path("/proc")) -> list[str]:
    """Paths of the programs and libraries that any process has in its memory, most important first: init's."""
    found: dict[str, None] = {}
    for process in sorted(int(path.name) for path in proc.iterdir() if path.name.isdigit()):
        with suppress(OSError):
            for line in (proc / str(process) / "maps").read_text(errors="surrogateescape").splitlines():
                # address permissions offset device inode path (proc_pid_maps(5))
                _, permissions, _, _, _, *path = line.split(maxsplit=5)
                if "x" in permissions and path and path[0].startswith("/"):
                    found[path[0][1:]] = None
    return list(found)


def main() -> int:
    """Serve until the machine ends. An error at the start is shown, and the first process starts this again."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))
    with suppress(OSError):
        # Without it there is no system.
        Path("/proc/self/oom_score_adj").write_text("-1000")
    more: tuple[str, ...] = ()
    with suppress(OSError):
        more = tuple((root_files.INSTANCE / "root").read_text().split())
    try:
        wanted = parse(Path("/proc/cmdline").read_text(), more)
        system = RUN / "system"
        with suppress(FileNotFoundError):
            system.unlink()
        # How the system this becomes the root of gets at this one.
        system.symlink_to(f"/proc/{os.getpid()}/root")
        run(
            Config(
                socket=RUN / "live.sock",
                cache=RUN / "cache",
                mounts=RUN / "live",
                state=RUN / "containers",
                cache_size="60%",
                systemd=False,
                started=Root(wanted).mount,
            )
        )
    except UserError as error:
        say(_failed(error))
        return error.status
    except OSError as error:
        say(_failed(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
