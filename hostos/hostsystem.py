"""What differs between the systems hostos runs on, as far as people have to be told about it."""

from __future__ import annotations

import platform

# Homebrew's name of what Debian calls so; "" where it has none.
_HOMEBREW = {"squashfs-tools": "squashfs", "squashfs-tools-ng": ""}


def host_arch() -> str:
    """The architecture of this machine, as uname(1) names it on Linux, and OS builds do everywhere."""
    return canonical(platform.machine())


def canonical(arch: str) -> str:
    """The same for any of an architecture's names: macOS and Debian say arm64 and amd64."""
    arch = arch.lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(arch, arch)


def is_mac() -> bool:
    return platform.system() == "Darwin"


def who_listens() -> str:
    """The command that shows which programs hold ports."""
    return "lsof -nP -iTCP -sTCP:LISTEN" if is_mac() else "ss -ltnup"


def install(*packages: str) -> str:
    """How to install these Debian packages, or what stands for them on a Mac."""
    if not is_mac():
        return f"sudo apt-get install {' '.join(packages)}"
    names = [_HOMEBREW.get(package, package) for package in packages]
    if all(names):
        return f"brew install {' '.join(names)}"
    lacking = ", ".join(package for package, name in zip(packages, names, strict=True) if not name)
    return f"Homebrew has no {lacking}: do this in a Linux machine (docs/macos.md)"
