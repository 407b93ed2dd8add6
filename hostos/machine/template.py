"""Templates: freshly booted machines on disk that clones start from (docs/warm-start.md).

A template is a directory of the cache that is never changed: the memory of a machine that has
booted and waits to be told who it is, and the state of its devices. QEMU loads it into a machine
that differs in any way without a word, and then hangs or goes wrong, so a template is named by a
digest of everything that has a part in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hostos import cpio
from hostos.errors import UserError
from hostos.machine import qemu
from hostos.machine.files import Unreadable, read_json, write_json
from hostos.machine.identity import INSIDE
from hostos.machine.kernel_command import EMULATED
from hostos.machine.network import mac_address
from hostos.machine.os_image import OsImage
from hostos.machine.qemu import Config, Ram
from hostos.paths import cache_dir, private_dir

# Raised when host and guest come to understand something else by it.
PROTOCOL = 1
# What a guest announces that can be cloned (OsImage.announces), and one that renews its random numbers by
# itself when it is: without a generation ID nothing else would tell it.
ABILITY = "identity"
RESEEDS = "reseed"
DEFAULT_LIMIT = 2 << 30
LIMIT_VARIABLE = "HOSTOS_TEMPLATE_LIMIT_MIB"
SWITCH = "HOSTOS_TEMPLATES"
_FAILED = "failed"


@dataclass(frozen=True)
class Template:
    """A template on disk. `failed`: why a start from it did not work, "" if none failed."""

    key: str
    directory: Path
    made_at: float
    used_at: float
    disk_bytes: int
    description: dict[str, Any]
    failed: str = ""

    @property
    def ram(self) -> Path:
        return self.directory / "ram"

    @property
    def state(self) -> Path:
        return self.directory / "state"


def enabled() -> bool:
    """Whether machines start from templates, and templates are made, without being asked for."""
    return os.environ.get(SWITCH, "").lower() not in ("off", "no", "0", "false")


def templates_dir() -> Path:
    return cache_dir() / "templates"


def why_not(config: Config, image: OsImage) -> str | None:
    """Why a machine like this is always booted and never cloned, None if it can be cloned."""
    if config.accelerator != "tcg":
        return f"only emulated machines are cloned, this one runs under {config.accelerator.upper()}"
    if config.net.kind != "user":
        return "a machine with an address of its own on the network is told it by the network, when it boots"
    if config.disk or config.shares:
        return "a machine with a disk or shares finds them when it boots"
    if config.reclaim:
        # QEMU 7.2 would punch holes into the template's memory.
        return "a machine that gives memory back cannot share it with its template"
    if ABILITY not in image.announces:
        return "this OS build cannot take on an identity (build it again with this version)"
    if not qemu.has_generation_id(config.arch) and RESEEDS not in image.announces:
        return (
            f"{config.arch} machines have no generation ID that would tell a clone from its template, "
            "and this OS build cannot renew its random numbers by itself"
        )
    return None


def key_of(config: Config, image: OsImage) -> str:
    """The name of the template for machines like `config`, whatever their name, keys and ports.

    Raises OSError if a file it depends on cannot be read.
    """
    like = replace(baking(config, image, Path("/")), binary=Path("qemu"), kernel=Path("kernel"))
    digests = _Digests()
    parts = {
        "protocol": PROTOCOL,
        "command": qemu.command(like),
        "archive": hashlib.sha256(archive()).hexdigest(),
        "qemu": digests.of(config.binary.resolve()),
        "kernel": digests.of(config.kernel),
        "initrd": digests.of(image.initrd(config.memory_mib)),
    }
    digests.keep()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def archive() -> bytes:
    """What makes an OS boot as a template: sshd waits at a FIFO among its configuration files.

    No key is among it; the empty host key keeps the guest from making one.
    """
    wanted = "etc/systemd/system/multi-user.target.wants"
    service = "etc/systemd/system/ssh.service.d"
    # It is not ready before somebody is who he is; nothing else must wait for that.
    started = b"[Service]\nType=exec\n"
    link = cpio.Entry(
        f"{wanted}/hostos-template.service",
        stat.S_IFLNK | 0o777,
        data=b"/usr/lib/systemd/system/hostos-template.service",
    )
    out = io.BytesIO()
    cpio.write_newc(
        [
            *(cpio.directory(path) for path in ("etc", "etc/hostos")),
            cpio.directory(INSIDE, 0o700),
            cpio.file("etc/hostos/template", b""),
            cpio.file(f"{INSIDE}/ssh_host_ed25519_key", b"", 0o600),
            *(cpio.directory(path) for path in ("etc/ssh", "etc/ssh/sshd_config.d")),
            cpio.Entry("etc/ssh/sshd_config.d/00-identity.conf", stat.S_IFIFO | 0o600),
            *(cpio.directory(path) for path in ("etc/systemd", "etc/systemd/system", service, wanted)),
            cpio.file(f"{service}/template.conf", started),
            link,
        ],
        out,
    )
    return out.getvalue()


def baking(config: Config, image: OsImage, directory: Path, sockets: Path | None = None) -> Config:
    """The machine that becomes the template for `config`, with its files in `directory`."""
    sockets = sockets or directory
    given = config.cmdline.split()
    words = [image.cmdline, *(word for word in EMULATED[image.arch].split() if word in given), "hostos.template"]
    return replace(
        config,
        name="template",
        cmdline=" ".join(words),
        # Each clone gets its own from inside: this one is part of the saved card.
        mac=mac_address("template"),
        forwards=(),
        initrd=directory / "initrd",
        serial_log=directory / "serial.log",
        pid_file=directory / "qemu.pid",
        console_socket=sockets / "console.sock",
        monitor_socket=sockets / "monitor.sock",
        agent_socket=sockets / "agent.sock",
        ram=Ram(directory / "ram", private=False),
        incoming=False,
    )


def cloning(config: Config, template: Template) -> Config:
    """`config` as a clone of `template`."""
    return replace(config, ram=Ram(template.ram, private=True), incoming=True)


def find(key: str) -> Template | None:
    """The template called `key`, if there is a whole one (it may have `failed`)."""
    return _load(templates_dir() / key)


def all_templates() -> list[Template]:
    """Every template, the one used last first."""
    try:
        places = list(templates_dir().iterdir())
    except OSError:
        return []
    found = [_load(place) for place in places if not place.name.startswith(".") and place.is_dir()]
    return sorted((each for each in found if each), key=lambda each: -each.used_at)


def _load(directory: Path) -> Template | None:
    try:
        description = read_json(directory / "template.json")
        if description is None:
            return None
        status = directory.lstat()
        # Whoever could write here could put anything into a machine of ours.
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
            return None
        failed = directory / _FAILED
        return Template(
            key=directory.name,
            directory=directory,
            made_at=float(description["made_at"]),
            used_at=(directory / "template.json").stat().st_mtime,
            disk_bytes=sum(each.stat().st_blocks * 512 for each in directory.iterdir()),
            description=description,
            failed=failed.read_text().strip() if failed.exists() else "",
        )
    except (OSError, Unreadable, KeyError, TypeError, ValueError):
        return None


def mark_used(template: Template) -> None:
    """It goes last when room is made. Never fails."""
    with contextlib.suppress(OSError):
        os.utime(template.directory / "template.json")


def mark_failed(template: Template, reason: str) -> None:
    """It is not tried again until it is made anew. Never fails: it may be gone."""
    try:
        if template.directory.is_dir():
            (template.directory / _FAILED).write_text(reason + "\n")
    except OSError:
        pass


def remove(template: Template) -> None:
    """Delete it; machines that run from it go on. Raises OSError."""
    aside = template.directory.with_name(f".{template.key}.old")
    shutil.rmtree(aside, ignore_errors=True)
    # In one step, so that nobody finds half of one.
    template.directory.rename(aside)
    shutil.rmtree(aside)


def prune(limit: int, *, keep: str = "") -> list[Template]:
    """Delete those not used for longest until the rest take `limit` bytes; returns the deleted.

    `keep`: one that stays whatever its size. Raises OSError.
    """
    removed = []
    total = 0
    for each in all_templates():
        total += each.disk_bytes
        if each.key != keep and total > limit:
            total -= each.disk_bytes
            remove(each)
            removed.append(each)
    return removed


def limit_bytes() -> int:
    """How much room templates may take together; raises UserError."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    if not text:
        return DEFAULT_LIMIT
    if not text.isdecimal():
        raise UserError(f"{LIMIT_VARIABLE}={text!r} is not a number of MiB", f"e.g. {LIMIT_VARIABLE}=1024")
    return int(text) << 20


class _Digests:
    """SHA-256 of files, remembered while size, inode and times stay the same."""

    def __init__(self) -> None:
        self._path = templates_dir() / "digests.json"
        self._changed = False
        try:
            self._known: dict[str, Any] = read_json(self._path) or {}
        except Unreadable:
            self._known = {}

    def of(self, path: Path) -> str:
        """Raises OSError."""
        status = path.stat()
        facts = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        known = self._known.get(str(path))
        if isinstance(known, dict) and known.get("facts") == facts and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._known[str(path)] = {"facts": facts, "sha256": digest, "at": time.time()}
        self._changed = True
        return digest

    def keep(self) -> None:
        if not self._changed:
            return
        content = {name: value for name, value in self._known.items() if name != "schema" and Path(name).exists()}
        with contextlib.suppress(OSError, UserError):
            write_json(private_dir(self._path.parent) / self._path.name, content)
