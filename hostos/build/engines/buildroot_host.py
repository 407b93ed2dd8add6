"""What the build machine must have, looked at before the first compile."""

from __future__ import annotations

import locale
import os
import re
import shutil
import subprocess
from pathlib import Path

from hostos.errors import UserError

# Tool -> Debian package. The list is that of Buildroot's manual ("System requirements") plus what
# a kernel with objtool needs.
_SAME_NAME = (
    *("bash", "bc", "bison", "bzip2", "cpio", "file", "flex", "git", "gzip", "patch", "perl"),
    *("python3", "rsync", "sed", "tar", "unzip", "wget"),
)
TOOLS = {
    **{tool: tool for tool in _SAME_NAME},
    **dict.fromkeys(("g++", "gcc", "make"), "build-essential"),
    **dict.fromkeys(("find", "xargs"), "findutils"),
    "awk": "gawk",
    "cmp": "diffutils",
    "xz": "xz-utils",
}
PERL_MODULES = ("Data::Dumper", "ExtUtils::MakeMaker", "FindBin", "IPC::Cmd", "Thread::Queue")

_LEAKING = (
    *("CC", "CXX", "CPP", "CFLAGS", "CXXFLAGS", "LDFLAGS", "GREP_OPTIONS", "PERL_MM_OPT", "PKG_CONFIG_PATH"),
    *("PYTHONPATH", "LD_LIBRARY_PATH", "MAKEFLAGS", "MFLAGS", "MACHINE", "O", "TARGET_DIR"),
)

# An output directory of the default profile took 5.2 GB with a ready toolchain; the rest is room for downloads
# and, for "internal", an estimate of what building the compiler takes.
DISK_NEEDED = {"internal": 18 << 30, "debian": 9 << 30, "external": 9 << 30}


def check(arch: str) -> None:
    """Raise one `UserError` with everything that is missing and the command that installs it."""
    missing: dict[str, str] = {tool: package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    if "perl" not in missing:
        for module in PERL_MODULES:
            if subprocess.run(["perl", f"-M{module}", "-e", "1"], capture_output=True, check=False).returncode != 0:
                missing[f"the Perl module {module}"] = "perl"
    if arch == "x86_64" and "gcc" not in missing and not has_header("gelf.h"):
        missing["gelf.h"] = "libelf-dev"
    if shutil.which("locale") is None or not _has_utf8():
        missing["a UTF-8 locale"] = "locales"
    if missing:
        raise UserError(
            f"Buildroot needs {', '.join(missing)}, not found on this machine",
            f"apt-get install {' '.join(sorted(set(missing.values())))}",
        )
    shown = subprocess.run(["make", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", shown)
    if found is None or (int(found[1]), int(found[2])) < (3, 81):
        raise UserError("Buildroot needs GNU make 3.81 or newer", "apt-get install make")


def check_disk(where: Path, toolchain: str, built: bool) -> None:
    """Raise `UserError` when `where` has not the room for a build. `built`: one is there already,
    and only grows by what changed."""
    needed = DISK_NEEDED.get(toolchain, DISK_NEEDED["external"]) // (4 if built else 1)
    where.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(where).free
    if free < needed:
        raise UserError(
            f"a Buildroot build needs about {needed / 2**30:.0f} GiB in {where}, {free / 2**30:.1f} GiB are free",
            "free some room, or move the cache: HOSTOS_HOME=<directory> invoke build --engine buildroot",
        )


def environment() -> dict[str, str]:
    """The environment of every Buildroot command.

    Variables that would leak into the build are cleared; configure scripts of GNU tar and coreutils
    refuse root unless told that it is meant.
    """
    env = {"LC_ALL": "C.UTF-8"}
    if os.geteuid() == 0:
        env["FORCE_UNSAFE_CONFIGURE"] = "1"
    # An empty value counts as unset to Buildroot, whereas these, set, break or alter builds.
    for name in _LEAKING:
        if name in os.environ:
            env[name] = ""
    # "." or nothing between colons would make Buildroot stop.
    env["PATH"] = ":".join(each for each in os.environ.get("PATH", "/usr/bin:/bin").split(":") if each.startswith("/"))
    return env


def full_environment() -> dict[str, str]:
    """`environment()` over the process's own, for `subprocess`."""
    return {**os.environ, **environment()}


def has_header(name: str) -> bool:
    """Whether the build machine's compiler finds the header."""
    answer = subprocess.run(
        ["gcc", "-E", "-x", "c", "-"], input=f"#include <{name}>\n", capture_output=True, text=True, check=False
    )
    return answer.returncode == 0


def _has_utf8() -> bool:
    """Whether the locale that is used below exists; the process's own is left as it is."""
    answer = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=False).stdout.lower()
    return "c.utf" in answer or "utf8" in answer or "utf-8" in locale.getpreferredencoding().lower()
