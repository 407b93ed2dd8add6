"""A machine while it comes up: whether QEMU lives, what the guest's console says, the time that is left."""

from __future__ import annotations

import re
import time

from hostos.errors import UserError, failure
from hostos.machine.instance import Instance
from hostos.machine.process import QemuProcess
from hostos.machine.root import heard

TAIL_LINES = 12
# What the guest says when it cannot come up -> what to do.
_FATAL = {
    "Initramfs unpacking failed": "give more --memory, or build the OS again (it may be damaged)",
    "hostos: initrd incomplete": "give more --memory, or build the OS again (it may be damaged)",
    "Oops: ": "the kernel broke: the initrd may be damaged (build the OS again), or try another --accel",
    "Kernel panic": "see the lines above; try more --memory, another --accel or another --os",
}
_PORT_TAKEN = re.compile(r"Could not set up host forwarding rule '([a-z]+):([0-9.]*):(\d+)-")
# What QEMU says of a disk that somebody else writes to (block/file-posix.c).
_LOCKED = 'Failed to get "write" lock'


class PortTaken(Exception):  # noqa: N818
    """Another process took a port between choice and use."""

    def __init__(self, protocol: str, port: int) -> None:
        super().__init__(f"port {port}/{protocol} was taken meanwhile")
        self.protocol = protocol
        self.port = port


class Watch:
    """QEMU's life, the guest's console, and the time that is left."""

    def __init__(self, instance: Instance, process: QemuProcess, total: float | None) -> None:
        self.instance = instance
        self.process = process
        self.began = time.monotonic()
        self.total = total
        self._read = 0
        self._rest = ""
        # What it says about its root, if that is an image.
        self.heard: list[str] = []

    def check(self) -> None:
        """Raises UserError (status 1) if QEMU has ended, the guest has given up or time is up."""
        self._scan_console()
        if not self.process.alive():
            self._scan_console()
            raise self._ended()
        if self.out_of_time():
            raise self.failed(f"it was not ready within {self.total:g} s", "give it longer: --timeout SECONDS")

    def check_after_loss(self) -> None:
        """`check` when a connection broke: they do a moment before QEMU is gone, and how it ended
        says more."""
        self.process.wait(0.5)
        self.check()

    def fault(self) -> Exception | None:
        """Why QEMU ended, where that was neither its own doing nor the guest's: killed, a port taken."""
        self.process.wait(0.5)
        if self.process.alive():
            return None
        ended = self._ended()
        return ended if isinstance(ended, PortTaken) or (self.process.exit_status() or 0) < 0 else None

    def out_of_time(self) -> bool:
        return self.total is not None and time.monotonic() - self.began > self.total

    def last_words(self) -> str:
        """How QEMU ended or got stuck, in one line."""
        said = self.instance.qemu_log.read_text(errors="replace").strip().splitlines()
        first = next((line for line in said if "warning:" not in line), "it said nothing")
        state = "stopped executing" if self.process.alive() else "ended"
        return f"QEMU {state}: {clean(first)[:200]}"

    @property
    def spoke(self) -> bool:
        """Whether the guest has printed anything yet."""
        if not self._read:
            self._scan_console()
        return self._read > 0

    def failed(self, reason: str, hint: str = "") -> UserError:
        """`reason`, with the last lines of the console."""
        tail = console_tail(self.instance)
        shown = "\n".join(f"    | {line}" for line in tail) if tail else "    (the guest printed nothing)"
        more = f"hostos logs -m {self.instance.name} --serial shows all of it"
        return failure(f"{reason}\n  console:\n{shown}", f"{hint}; {more}" if hint else more)

    def _scan_console(self) -> None:
        try:
            with self.instance.serial_log.open("rb") as log:
                log.seek(self._read)
                data = log.read()
        except FileNotFoundError:
            return
        self._read += len(data)
        # The last line may be incomplete: kept for the next time.
        lines = (self._rest + data.decode("utf-8", "replace")).split("\n")
        self._rest = lines.pop()[-4096:]
        self.heard += [said for line in lines if (said := heard(clean(line)))]
        for line in [*lines, self._rest]:
            for pattern, hint in _FATAL.items():
                if pattern in line:
                    raise self.failed(f"the guest failed: {clean(line)}", hint)

    def _ended(self) -> Exception:
        status = self.process.exit_status()
        said = self.instance.qemu_log.read_text(errors="replace").strip()
        taken = _PORT_TAKEN.search(said)
        if taken:
            return PortTaken(taken[1], int(taken[3]))
        if _LOCKED in said:
            return self.failed("the disk is in use by another program", "fuser -v FILE shows which; --disk none")
        if status == 0 and not said:
            return self.failed("the guest powered itself off during its start")
        if status is not None and status < 0:
            how = f"was killed by signal {-status}"
        else:
            how = "ended" if status is None else f"ended with status {status}"
        return self.failed(f"QEMU {how}: {said or 'it said nothing'}", "hostos up --dry-run prints its command line")


_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
# Control characters but the tab. (What may stay, spelled out up to U+10FFFF, takes 8 ms to compile.)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def clean(line: str) -> str:
    """A line of the guest's, safe to print on a terminal."""
    return _UNPRINTABLE.sub("", _ESCAPE.sub("", line)).strip()


def console_tail(instance: Instance, lines: int = TAIL_LINES) -> list[str]:
    """The last lines the guest printed on its serial console."""
    try:
        with instance.serial_log.open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - 16384))
            text = log.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    cleaned = [clean(line) for line in text.splitlines()]
    return [line for line in cleaned if line][-lines:]
