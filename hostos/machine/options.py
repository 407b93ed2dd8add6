"""What the user asked a machine to be, remembered between starts (`config.json`)."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hostos import config
from hostos.errors import UserError
from hostos.machine import root
from hostos.machine.accel import CHOICES
from hostos.machine.disk import normalise
from hostos.machine.files import Unreadable
from hostos.machine.names import check_hostname
from hostos.machine.network import Forward, Net, parse_net
from hostos.machine.os_image import ARCHITECTURES, OsImage
from hostos.machine.share import Share, parse_share

DEFAULT_MEMORY_MIB = 1024
DEFAULT_CPUS = 2
# CONFIG_NR_CPUS of the kernel we build.
MAX_CPUS = 64
# Instead of shares: those of the last start no more.
NO_SHARES = "none"
SCALE_VARIABLE = "HOSTOS_TIMEOUT_SCALE"


@dataclass(frozen=True)
class UpOptions:
    """Options of `hostos up`; None means: as last time, else the default.

    `keys` are lines of authorized_keys, `os` an OS directory (or `kernel` and `initrd` files, of
    another maker), `arch` the architecture for which one is looked for without them, `append` more
    words for the kernel, `root` the image that becomes the system (`peers`: who has it; `persist`: its
    changes are kept). `timeout` (seconds, for the whole start) and `warm` (insist on a start from a
    template, or refuse it) are not remembered.
    """

    keys: tuple[str, ...] | None = None
    memory_mib: int | None = None
    cpus: int | None = None
    os: Path | None = None
    arch: str | None = None
    accel: str | None = None
    hostname: str | None = None
    publish: tuple[Forward, ...] | None = None
    net: str | None = None
    lease_files: tuple[str, ...] | None = None
    disk: str | None = None
    shares: tuple[str, ...] | None = None
    reclaim: bool | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    append: str | None = None
    timeout: float | None = None
    warm: bool | None = None
    root: str | None = None
    peers: tuple[str, ...] | None = None
    persist: bool | None = None

    @property
    def shared(self) -> tuple[Share, ...]:
        """The shares; `none` among them means none."""
        texts = self.shares or ()
        return () if NO_SHARES in texts else tuple(parse_share(text) for text in texts)

    @property
    def network(self) -> Net:
        return parse_net(self.net or "user")

    def over(self, remembered: UpOptions) -> UpOptions:
        """These options, completed by the remembered ones."""
        if self.net is not None and self.net != remembered.net:
            # Ports and lease files belong to a network.
            keep = remembered.publish if self.network.kind == remembered.network.kind else None
            remembered = replace(remembered, lease_files=None, publish=keep)
        if self.root is not None and self.root != remembered.root:
            # Peers and changes belong to an image.
            remembered = replace(remembered, peers=None, persist=None)
        if self.os is not None or self.kernel is not None or self.arch not in (None, remembered.arch):
            # What is booted is one choice.
            remembered = replace(remembered, os=None, arch=None, kernel=None, initrd=None, append=None)
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(remembered, **{name: value for name, value in given.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        once = ("timeout", "warm")
        content = {name: value for name, value in asdict(self).items() if value is not None and name not in once}
        return {name: str(value) if isinstance(value, Path) else value for name, value in content.items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> UpOptions:
        """Raises Unreadable."""
        try:
            options = cls(
                keys=tuple(content["keys"]) if "keys" in content else None,
                memory_mib=content.get("memory_mib"),
                cpus=content.get("cpus"),
                os=Path(content["os"]) if "os" in content else None,
                arch=content.get("arch"),
                accel=content.get("accel"),
                hostname=content.get("hostname"),
                publish=tuple(Forward(**each) for each in content["publish"]) if "publish" in content else None,
                net=content.get("net"),
                lease_files=tuple(content["lease_files"]) if "lease_files" in content else None,
                disk=content.get("disk"),
                shares=tuple(content["shares"]) if "shares" in content else None,
                reclaim=content.get("reclaim"),
                kernel=Path(content["kernel"]) if "kernel" in content else None,
                initrd=Path(content["initrd"]) if "initrd" in content else None,
                append=content.get("append"),
                root=content.get("root"),
                peers=tuple(content["peers"]) if "peers" in content else None,
                persist=content.get("persist"),
            )
            options.check()
        except (TypeError, AttributeError, UserError) as error:
            raise Unreadable(f"remembered options are damaged: {error}") from error
        return options

    def check(self) -> None:
        """Raises UserError for values that cannot be meant."""
        if self.memory_mib is not None and self.memory_mib <= 0:
            raise UserError(f"{self.memory_mib} MiB is not an amount of memory", "e.g. --memory 512")
        if self.cpus is not None and not 1 <= self.cpus <= MAX_CPUS:
            raise UserError(f"{self.cpus} is not a number of CPUs for a guest", f"give 1 to {MAX_CPUS}")
        if self.hostname is not None:
            check_hostname(self.hostname)
        if self.accel is not None and self.accel not in CHOICES:
            raise UserError(f"there is no accelerator {self.accel!r}", f"one of {', '.join(CHOICES)}")
        if self.arch is not None and self.arch not in ARCHITECTURES:
            raise UserError(f"there is no architecture {self.arch!r}", f"one of {', '.join(ARCHITECTURES)}")
        if self.kernel is not None and self.os is not None:
            raise UserError("--os and --kernel exclude each other", "leave one of them out")
        if self.initrd is not None and self.kernel is None:
            raise UserError("--initrd without --kernel", "an OS of ours has its own initrd; others need both")
        if self.kernel is not None and self.network.own_address:
            raise UserError(f"--kernel does not go with --net {self.net}", "guests of other makers: --net user")
        root.check(self)
        if self.timeout is not None and not self.timeout > 0:
            raise UserError("the timeout must be more than 0 s", "e.g. --timeout 120")
        if self.disk is not None:
            normalise(self.disk)
        for text in self.shares or ():
            if text != NO_SHARES:
                parse_share(text)
        for text in self.lease_files or ():
            from hostos.machine.leases import named_source

            named_source(text)
        if self.network.own_address and self.publish:
            raise UserError(
                f"nothing is published with --net {self.net}: the guest has an address of its own",
                "connect to it there: hostos ip",
            )
        if self.lease_files and not self.network.own_address:
            raise UserError("--lease-file is for --net bridge=NAME, tap=NAME or vmnet", "leave it out")
        seen: set[tuple[str, int]] = set()
        for forward in self.publish or ():
            if (forward.protocol, forward.host_port) in seen:
                raise UserError(
                    f"port {forward.host_port}/{forward.protocol} is published twice",
                    "use each host port once",
                )
            seen.add((forward.protocol, forward.host_port))


def check_memory(memory_mib: int, image: OsImage) -> None:
    """Raises UserError below what the OS needs to unpack (it would boot half-unpacked), or above
    what this host has."""
    import psutil

    if memory_mib < image.min_memory_mib:
        raise UserError(
            f"{memory_mib} MiB of memory is too little: this OS needs at least {image.min_memory_mib} MiB",
            f"--memory {image.min_memory_mib} or more",
        )
    total = psutil.virtual_memory().total >> 20
    if memory_mib > total:
        raise UserError(f"{memory_mib} MiB of memory is more than this host has ({total} MiB)", "give less --memory")


def timeout_scale() -> float:
    """By how much all deadlines are stretched, for slow or loaded hosts: HOSTOS_TIMEOUT_SCALE, else
    the setting timeouts.scale. Raises UserError."""
    text = os.environ.get(SCALE_VARIABLE)
    if text is None:
        return float(config.get("timeouts.scale"))
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale <= 1000:
        raise UserError(f"{SCALE_VARIABLE}={text!r} is not a factor", f"e.g. {SCALE_VARIABLE}=2")
    return scale
