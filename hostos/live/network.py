"""A network of its own for a container (`--network nat`): it can connect out, under the machine's address.

    container: host0 10.88.a.b/30 ── hcN (machine) ── forwarded, masqueraded (`nat`) ── the machine's network

The network namespace belongs to the machine, so the container can change nothing about it. Its routes keep it
from the machine itself, from other containers, and from the host, whose loopback user networking would show it.
"""

from __future__ import annotations

import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

from hostos.live import nat, syscalls

MOST = 1 << 14
"""Networks of four addresses in 10.88.0.0/16."""
_MS_BIND = 4096
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def addresses(number: int) -> tuple[str, str]:
    """The machine's and the container's, of network `number`."""
    first = number * 4
    return f"10.88.{first >> 8}.{first & 255 | 1}", f"10.88.{first >> 8}.{first & 255 | 2}"


def make(stack: ExitStack, number: int, file: Path) -> Path:
    """Network `number`; its namespace is bound to `file`, which is returned. What must be undone goes onto
    `stack`. Raises OSError."""
    here, there = addresses(number)
    forbidden = ["10.88.0.0/16", f"{here}/32", *(f"{each}/32" for each in _own_addresses())]
    nat.masquerade()
    _FORWARD.write_text("1\n")
    file.touch()
    stack.callback(lambda: file.unlink(missing_ok=True))
    with syscalls.namespace(syscalls.CLONE_NEWNET, "network namespaces") as child:
        syscalls.mount(f"/proc/{child}/ns/net", file, "", _MS_BIND, "")
        stack.callback(syscalls.unmount_patiently, file, 1.0)
        outer = f"hc{number}"
        with suppress(OSError):
            _ip("link", "del", outer)  # left by a daemon that was killed
        _ip("link", "add", outer, "type", "veth")
        stack.callback(_remove, outer)
        inner = _peer(outer)
        _ip("link", "set", inner, "netns", str(child))
        _ip("addr", "add", f"{here}/30", "dev", outer)
        _ip("link", "set", outer, "up")
        for arguments in (
            ("link", "set", inner, "name", "host0"),
            ("addr", "add", f"{there}/30", "dev", "host0"),
            ("link", "set", "lo", "up"),
            ("link", "set", "host0", "up"),
            ("route", "add", "default", "via", here, "dev", "host0"),
            *(("route", "add", "unreachable", each) for each in dict.fromkeys(forbidden)),
        ):
            _ip(*arguments, within=child)
    return file


def _own_addresses() -> list[str]:
    """The machine's own, and its gateway, which is the host."""
    found = []
    for line in _ip("-o", "-4", "addr", "show").splitlines():
        words = line.split()
        if "inet" in words and not (address := words[words.index("inet") + 1].partition("/")[0]).startswith("127."):
            found.append(address)
    for line in _ip("route", "show").splitlines():
        words = line.split()
        if words[:2] == ["default", "via"]:
            found.append(words[2])
    return found


def _peer(interface: str) -> str:
    """The other end of a veth pair. BusyBox's `ip` can't give it a name."""
    index = Path(f"/sys/class/net/{interface}/iflink").read_text()
    for other in Path("/sys/class/net").iterdir():
        if (other / "ifindex").read_text() == index:
            return other.name
    raise OSError(f"{interface} has no other end")


def _remove(interface: str) -> None:
    with suppress(OSError):
        _ip("link", "del", interface)


def _ip(*arguments: str, within: int | None = None) -> str:
    before = ["nsenter", "-t", str(within), "-n", "--"] if within is not None else []
    try:
        done = subprocess.run(
            [*before, "ip", *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"ip {' '.join(arguments)}: no answer") from None
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()[:200]}")
    return done.stdout
