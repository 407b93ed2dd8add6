"""Builds a Containerfile through buildah, as everything is built here: in a user namespace, by root of nobody.

buildah(1), buildah-build(1). Commands run in its chroot isolation, which takes no container runtime: they are in our
sandbox already. What it makes is an OCI layout, which `oci` reads.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

from hostos.errors import UserError
from hostos.hostsystem import install
from hostos.image import sandbox, unpacked
from hostos.image.base import environment, logged
from hostos.image.entries import arrange
from hostos.image.pack import write_tar
from hostos.image.sandbox import Ids
from hostos.image.sources import read_directory
from hostos.steps import Steps

_IMAGE = "localhost/hostos-image"


def build(file: Path, epoch: int, who: Ids, log: Path, stack: ExitStack, steps: Steps, *, fresh: bool = False) -> Path:
    """The OCI layout it makes, there until `stack` is closed. `fresh`: nothing from buildah's cache.

    `epoch`: time of all files that it adds (Unix). Raises UserError if buildah is not installed or fails, then with
    the log's last lines.
    """
    if not shutil.which("buildah"):
        raise UserError("buildah is needed to build a Containerfile", install("buildah"))
    if not file.is_file():
        raise UserError(f"there is no {file}", "name the Containerfile itself, its directory is the context")
    work = sandbox.own(sandbox.scratch() / f"containerfile-{os.getpid()}", who)
    stack.callback(unpacked.remove, work, who)
    kept = sandbox.scratch() / "buildah"
    if not fresh and not kept.is_dir():
        sandbox.own(kept, who)
    context = _context(file.parent, stack)
    env = environment(epoch) | {
        "HOME": "/tmp/home",
        "TMPDIR": "/tmp/tmp",
        "XDG_RUNTIME_DIR": "/tmp/run",
        "BUILDAH_ISOLATION": "chroot",
        "STORAGE_DRIVER": "overlay",
        # It is in a user namespace, and must not make another.
        "_CONTAINERS_USERNS_CONFIGURED": "done",
        "_CONTAINERS_ROOTLESS_UID": "0",
    }
    storage = "/tmp/storage" if fresh else "/tmp/kept"
    buildah = ["buildah", "--root", storage, "--runroot", "/tmp/run/storage"]
    commands = [
        # Without --layers all that it adds would be one layer, made anew each time.
        [*buildah, "build", "--layers", "--timestamp", str(epoch), "--tag", _IMAGE, "--file", file.name, "."],
        [*buildah, "push", "--quiet", _IMAGE, "oci:/tmp/layout:latest"],
    ]

    def make() -> int:
        for name in ("context", "home", "tmp", "run", "kept"):
            (work / name).mkdir()
        if not fresh:
            sandbox.mount(str(kept), str(work / "kept"), None, sandbox.MS_BIND)
        sandbox.mount(str(work), "/tmp", None, sandbox.MS_BIND | sandbox.MS_REC)
        sandbox.mount("proc", "/proc", "proc", sandbox.MS_NOSUID | sandbox.MS_NODEV | sandbox.MS_NOEXEC)
        unpack = ["tar", "--extract", "--preserve-permissions", "--directory=/tmp/context"]
        status = sandbox.execute(unpack, env=env, stdin=context.fileno())
        for command in commands:
            status = status or sandbox.execute(command, env=env, cwd="/tmp/context")
        return status

    with steps.step(f"build {file.name}"):
        logged(make, log, who, network=True, what=f"building {file}")
    return work / "layout"


def _context(directory: Path, stack: ExitStack) -> BinaryIO:
    """A directory as a tar archive for those in the sandbox, who can't read it where it is."""
    spool = cast(BinaryIO, tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", "/var/tmp")))  # noqa: SIM115
    stack.enter_context(spool)
    kinds = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
    entries = [
        replace(entry, uid=0, gid=0, xattrs=())
        for entry in read_directory(directory, Steps())
        if stat.S_IFMT(entry.mode) in kinds
    ]
    with Steps().step("") as step:
        write_tar(arrange(entries, str(directory)), spool, 0, step, {})
    spool.flush()
    os.lseek(spool.fileno(), 0, os.SEEK_SET)
    return spool
