"""exec to SSH: hostos, booted and cloned from a template, beside debvm and beside Debian's kernel with
our initrd; same QEMU, TCG, two CPUs, in one run.

debvm (Debian's tool for throw-away machines) runs as it is, by its own `debvm-run`; only the
accelerator is set, because all must use the same one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import cloud_kernel
from bench.harness import Comparison, Series, prepare, publish
from hostos.build.debian_archive import find_mirror
from hostos.errors import UserError, failure
from hostos.machine import os_image, template
from hostos.paths import cache_dir
from hostos.steps import Steps

DEADLINE_S = 300.0
TRIES = 3


def run(rounds: int, steps: Steps) -> Path:
    """Boot each side `rounds` times, alternating, and publish. Raises `UserError` when a peer is missing."""
    for tool in ("debvm-create", "mkfs.ext4", "depmod"):
        if shutil.which(tool) is None:
            raise UserError(f"the benchmark needs its peers, and {tool}", "apt-get install debvm e2fsprogs kmod")
    before = prepare()
    with tempfile.TemporaryDirectory(prefix="hostos-bench-") as scratch:
        work = Path(scratch)
        key = work / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        with steps.step("debvm image"):
            image = _debvm_image(work, key)
        hostos = _Hostos(work, key)
        cloud_os = cloud_kernel.make(os_image.find(None), work / "cloud-kernel", steps)
        with steps.step("template"):
            hostos.up("--warm")
        debvm = Series("debvm-run to SSH")
        cloud = Series("Debian's cloud kernel with our initrd, to SSH")
        sides: list[tuple[Series, Callable[[], float]]] = [
            (debvm, lambda: _debvm(work, image)),
            (cloud, lambda: _cloud_kernel(work, key, cloud_os)),
        ]
        whole, to_ssh = Series("hostos up --cold, whole command"), Series("hostos up --cold, to SSH")
        warm, own = Series("hostos up (from a template), whole command"), Series("of which hostos's own processor time")
        status = Series("hostos status")
        for number in range(rounds):
            for series, measure in sides:
                with steps.step(f"{series.name}, {number + 1}") as step:
                    series.samples.append(_peer(measure, series))
                    step.detail = f"{series.samples[-1]:.2f} s"
            with steps.step(f"hostos {number + 1}") as step:
                seconds, system_is_up, _ = hostos.up("--cold")
                whole.samples.append(seconds)
                to_ssh.samples.append(seconds - system_is_up)
                seconds, _, processor = hostos.up("--warm", then=lambda: status.samples.append(hostos.status()))
                warm.samples.append(seconds)
                own.samples.append(processor)
                step.detail = f"{whole.samples[-1]:.2f} s, {seconds:.2f} s"
    comparisons = [
        Comparison(
            "exec to the first SSH command",
            debvm.name,
            [debvm, cloud, to_ssh, whole, warm],
            {to_ssh.name: 0.10, warm.name: 0.02},
        ),
        Comparison("the same kernel command line and initrd", cloud.name, [cloud, to_ssh], {to_ssh.name: 0.4}),
        Comparison("the launcher itself", warm.name, [warm, own, status]),
    ]
    return publish("boot", comparisons, before)


class _Hostos:
    """`hostos` as a user runs it, in a home of its own."""

    def __init__(self, work: Path, key: Path) -> None:
        # No template is made behind our back: it would take processor time from what is measured.
        self._env = {**os.environ, "HOSTOS_HOME": str(work / "home"), template.SWITCH: "off"}
        self._command = [str(Path(sys.executable).parent / "hostos")]
        self._key = key

    def up(self, how: str, then: Callable[[], object] = lambda: None) -> tuple[float, float, float]:
        """(the whole `hostos up`, its last stage, processor time of the command itself), in seconds.

        The last stage of a boot waits until the system has started everything, for which debvm has no
        counterpart. The machine is ended again, after `then`.
        """
        before = os.times()
        began = time.monotonic()
        up = self._run("up", how, "--accel", "tcg", "--key", f"{self._key}.pub", "--json")
        whole = time.monotonic() - began
        # QEMU is a grandchild that lives on: what has been waited for is the command.
        after = os.times()
        processor = after.children_user + after.children_system - before.children_user - before.children_system
        last = json.loads(up.strip().splitlines()[-1])
        then()
        self._run("kill")
        waiting = sum(stage["seconds"] for stage in last["stages"] if stage["name"] == "system is up")
        return whole, waiting, processor

    def status(self) -> float:
        began = time.monotonic()
        self._run("status")
        return time.monotonic() - began

    def _run(self, *words: str) -> str:
        done = subprocess.run([*self._command, *words], env=self._env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise failure(f"hostos {words[0]} failed: {done.stderr}")
        return done.stdout


def _cloud_kernel(work: Path, key: Path, os_dir: Path) -> float:
    """Seconds from the start of QEMU to the first command over SSH."""
    env = {**os.environ, "HOSTOS_HOME": str(work / "home")}
    hostos = str(Path(sys.executable).parent / "hostos")
    words = [hostos, "up", "-m", "cloud", "--dry-run", "--cold", "--accel", "tcg", "--json", "--os", str(os_dir)]
    shown = subprocess.run([*words, "--key", f"{key}.pub"], env=env, capture_output=True, text=True, check=False)
    if shown.returncode != 0:
        raise failure(f"hostos up --dry-run failed: {shown.stderr}")
    command = json.loads(shown.stdout)["command"]
    command[command.index("-cpu") + 1] = cloud_kernel.CPU
    port = int(re.search(r"hostfwd=tcp:127\.0\.0\.1:(\d+)-:22", " ".join(command))[1])  # type: ignore[index]
    return _until_ssh(command, {}, work / "cloud.log", port, key)


def _debvm_image(work: Path, key: Path) -> Path:
    """A fresh debvm image; the expensive part (its packages) comes from the mirror every time."""
    template = cache_dir() / "bench" / "debvm-trixie.ext4"
    identity = template.with_suffix(".key")
    if not template.exists():
        template.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(key, identity)
        partial = template.with_suffix(".part")
        subprocess.run(
            ["debvm-create", "-r", "trixie", "-k", f"{key}.pub", "-o", partial, "--", find_mirror().main],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        partial.rename(template)
    shutil.copy(identity, work / "debvm-key")
    return Path(shutil.copy(template, work / "debvm.ext4"))


def _peer(measure: Callable[[], float], series: Series) -> float:
    """What it measures. debvm's machine hung in two of seven emulated starts (QEMU 7.2): noted, and tried again."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(UserError):
            return measure()
        series.notes["starts that failed"] = series.notes.get("starts that failed", 0) + 1
    return measure()


def _debvm(work: Path, image: Path) -> float:
    """Seconds from the start of debvm-run to the first command over SSH."""
    shim = work / "shim"
    shim.mkdir(exist_ok=True)
    qemu = shutil.which("qemu-system-x86_64")
    wrapper = shim / "qemu-system-x86_64"
    wrapper.write_text(f'#!/bin/sh\nexec {qemu} "$@" -machine accel=tcg -cpu {cloud_kernel.CPU} -smp 2\n')
    wrapper.chmod(0o755)
    (shim / "kvm").unlink(missing_ok=True)
    (shim / "kvm").symlink_to(wrapper)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    identity = work / "debvm-key"
    identity.chmod(0o600)
    path = f"{shim}:{os.environ['PATH']}:/usr/sbin:/sbin"
    command: list[str | Path] = ["debvm-run", "-i", image, "-s", str(port)]
    return _until_ssh(command, {"PATH": path}, work / "debvm.log", port, identity)


def _until_ssh(command: Sequence[str | Path], env: dict[str, str], log: Path, port: int, key: Path) -> float:
    """Seconds from the start of `command` to the first command over SSH."""
    began = time.monotonic()
    with _process(command, env, log) as process:
        while time.monotonic() - began < DEADLINE_S:
            if process.poll() is not None:
                raise failure(f"{command[0]} ended: {log.read_text(errors='replace')[-2000:]}")
            if _banner(port) and _ssh(port, key):
                return time.monotonic() - began
            time.sleep(0.05)
    raise failure(f"{command[0]} did not answer within {DEADLINE_S:.0f} s")


@contextlib.contextmanager
def _process(command: Sequence[str | Path], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _banner(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 2) as connection:
            connection.settimeout(2)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _ssh(port: int, key: Path) -> bool:
    options = ["-q", "-F", "/dev/null", "-i", str(key), "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]
    options += ["-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=30", "-p", str(port)]
    return subprocess.run(["ssh", *options, "root@127.0.0.1", "true"], check=False).returncode == 0
