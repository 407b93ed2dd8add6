"""Running the tools a build is made of: logged, with progress, with the log's tail when one fails."""

from __future__ import annotations

import collections
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hostos.errors import UserError, failure

TAIL_LINES = 15

# Debian package that has a tool, for the hint.
PACKAGES = {
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "aarch64-linux-gnu-ld": "binutils-aarch64-linux-gnu",
    "apt-get": "apt",
    "apt-cache": "apt",
    "bc": "bc",
    "bison": "bison",
    "dot": "graphviz",
    "dpkg-deb": "dpkg",
    "flex": "flex",
    "gcc": "build-essential",
    "grub-mkimage": "grub-common",
    "ld": "build-essential",
    "ldconfig": "libc-bin",
    "make": "build-essential",
    "mcopy": "mtools",
    "mformat": "mtools",
    "mmd": "mtools",
    "mmdebstrap": "mmdebstrap",
    "objcopy": "binutils",
    "objdump": "binutils",
    "perl": "perl",
    "python3.13": "python3.13-minimal",
    "tar": "tar",
    "x86_64-linux-gnu-gcc": "gcc-x86-64-linux-gnu",
    "x86_64-linux-gnu-ld": "binutils-x86-64-linux-gnu",
    "xorriso": "xorriso",
    "xz": "xz-utils",
    "zstd": "zstd",
}


def require(*tools: str) -> None:
    """Raises `UserError` naming every tool that is not installed and how to get them."""
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [tool for tool in tools if shutil.which(tool, path=search) is None]
    if missing:
        packages = sorted({PACKAGES.get(tool, tool) for tool in missing})
        raise UserError(
            f"the build needs {', '.join(missing)}, which is not installed here",
            f"apt-get install {' '.join(packages)}   (or run ./bootstrap, which installs everything)",
        )


def run(
    command: Sequence[str | Path],
    *,
    log: Path | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Run `command`; its output (stdout and stderr together) goes to `log`, line by line to
    `on_line`, and is returned. The whole process group is ended on Ctrl-C.

    Raises `UserError` (status 1) with the last lines of the output when the command fails.
    """
    words = [str(word) for word in command]
    tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
    collected: list[str] = []
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    sink = log.open("a", encoding="utf-8") if log is not None else None
    try:
        if sink is not None:
            sink.write(f"$ {shlex.join(words)}\n")
            sink.flush()
        try:
            process = subprocess.Popen(
                words,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except FileNotFoundError:
            require(words[0])
            raise
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if sink is not None:
                    sink.write(line)
                else:
                    collected.append(line)
                tail.append(line.rstrip("\n"))
                if on_line is not None:
                    on_line(line.rstrip("\n"))
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        finally:
            process.stdout.close()
    finally:
        if sink is not None:
            sink.close()
    if status != 0:
        where = f"whole log: {log}" if log is not None else ""
        text = "\n".join(f"    {line}" for line in tail)
        raise failure(
            f"{Path(words[0]).name} failed (exit {status}):\n{text}",
            f"{where}\n        to run it again: {shlex.join(words)}" + (f"   (in {cwd})" if cwd else ""),
        )
    return "".join(collected)
