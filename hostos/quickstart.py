"""The guided tour: from nothing to a container that runs from its hash, with the commands a user
would type, and a table of what it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostos.build import cache
from hostos.build.debian_archive import find_mirror
from hostos.build.run import require, run
from hostos.errors import failure
from hostos.mirror.control import proxy_for
from hostos.paths import cache_dir
from hostos.steps import Steps, Talk

# A real Debian with a few things people run, a few hundred MB unpacked.
SUITE = "trixie"
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "python3",
    "nginx-light",
    "git",
    "nodejs",
    "procps",
    "iproute2",
    "openssh-server",
)
NAME = "demo/debian"
HELLO = 'import platform; print("hello from", platform.freedesktop_os_release()["PRETTY_NAME"])'


@dataclass
class Tour:
    """Runs commands as a user would, shows them, and collects lines for the closing table."""

    table: list[tuple[str, str]] = field(default_factory=list)

    def say(self, *words: str) -> None:
        shown = " ".join(f"'{word}'" if " " in word else word for word in words)
        print(f"\n$ {shown}", file=sys.stderr, flush=True)

    def command(self, *words: str) -> float:
        """Run a command in the open; returns its seconds. Raises `UserError` when it fails."""
        self.say(*words)
        began = time.monotonic()
        status = subprocess.run([_program(words[0]), *words[1:]], check=False).returncode
        if status != 0:
            raise failure(f"{' '.join(words[:3])} … failed (exit {status})", "what it said stands above")
        return time.monotonic() - began

    def answer(self, *words: str) -> str:
        """Run a command for its standard output."""
        self.say(*words)
        done = subprocess.run([_program(words[0]), *words[1:]], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise failure(f"{' '.join(words[:3])} … failed (exit {done.returncode})", "what it said stands above")
        return done.stdout.strip()

    def boot_container(self, image: str, *command: str) -> dict[str, Any]:
        """Run a command in a container of `image`; returns the figures `--json` gives."""
        words = ["hostos", "container", "boot", "--json", image, "--", *command]
        self.say(*words)
        done = subprocess.run([_program(words[0]), *words[1:]], stderr=subprocess.PIPE, text=True, check=False)
        *talk, report = done.stderr.strip().splitlines() or [""]
        print("\n".join(talk), file=sys.stderr, end="\n" if talk else "")
        if done.returncode != 0:
            raise failure(f"the container failed (exit {done.returncode}): {report}", "hostos logs --journal")
        facts: dict[str, Any] = json.loads(report)
        return facts


def run_tour(*, fresh: bool = False) -> None:
    """Build, boot, publish, live-boot. Raises `UserError` with the failing step's own words."""
    tour = Tour()
    steps = Steps(Talk())
    seconds = tour.command("invoke", "build")
    tour.table.append(("build the OS", f"{seconds:.1f} s"))

    began = time.monotonic()
    image = demonstration_image(steps, fresh=fresh)
    tour.table.append(
        ("build a Debian container image", f"{time.monotonic() - began:.1f} s, {image.stat().st_size / 1e6:.0f} MB")
    )
    began = time.monotonic()
    digest = tour.answer("hostos", "image", "publish", str(image), "--name", NAME)
    print(digest, file=sys.stderr)
    tour.table.append(("publish it", f"{time.monotonic() - began:.1f} s"))

    running = _machine_is_running()
    if running:
        print("\nthe machine is running already", file=sys.stderr)
    else:
        tour.say("hostos", "up", "--json")
        up = subprocess.run([_program("hostos"), "up", "--json"], stdout=subprocess.PIPE, text=True, check=False)
        if up.returncode != 0:
            raise failure("hostos up failed", "what it said stands above")
        for stage in json.loads(up.stdout.splitlines()[-1])["stages"]:
            tour.table.append((f"boot: {stage['name']}", f"{stage['seconds']:.2f} s"))

    facts = tour.boot_container(digest, "python3", "-c", HELLO)
    tour.table.append(("container: command to first output", f"{facts['first_output_seconds']:.2f} s"))
    share = 100 * facts["fetched"] / facts["size"]
    tour.table.append(
        (
            "fetched of the image",
            f"{facts['fetched'] / 1e6:.1f} of {facts['size'] / 1e6:.1f} MB ({share:.0f} %)",
        )
    )
    print("\n" + "\n".join(f"  {name:38} {value}" for name, value in tour.table))
    print(
        f"""
The machine keeps running. Try:
  hostos ssh                                  a shell in it
  hostos container boot {digest[:16]}…        the container's own init
  hostos container boot {NAME} -- bash        (in a terminal) a shell in the container
  hostos down                                 power off
(. .venv/bin/activate puts `hostos` and `invoke` on your PATH.)"""
    )


def demonstration_image(steps: Steps, *, fresh: bool = False) -> Path:
    """A tar archive of a Debian system, made with mmdebstrap once and then kept in the cache."""
    key = cache.digest({"suite": SUITE, "packages": PACKAGES})[:12]
    target = cache_dir() / "quickstart" / f"debian-{key}.tar"
    if target.exists() and not fresh:
        steps.note(f"using {target}")
        return target
    require("mmdebstrap")
    target.parent.mkdir(parents=True, exist_ok=True)
    # mmdebstrap tells the format by the suffix, and as an ordinary user makes a user namespace.
    partial = target.with_name(f"partial-{os.getpid()}.tar")
    count = 0
    with steps.step("Debian container image") as step:

        def watch(line: str) -> None:
            nonlocal count
            if line.startswith(("Setting up", "Unpacking", "Get:")):
                count += 1
                step.progress(f"{count} steps, {line[:60]}")

        mirror = find_mirror().main
        proxy = proxy_for(mirror)
        try:
            run(
                [
                    "mmdebstrap",
                    "--variant=minbase",
                    "--verbose",
                    f"--include={','.join(PACKAGES)}",
                    SUITE,
                    partial,
                    mirror,
                ],
                log=target.with_suffix(".log"),
                on_line=watch,
                # Not an option of apt's: mmdebstrap would write it into the image.
                env={"http_proxy": proxy} if proxy else None,
            )
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _machine_is_running() -> bool:
    shown = subprocess.run([_program("hostos"), "status", "--json"], capture_output=True, text=True, check=False)
    try:
        return bool(json.loads(shown.stdout)["state"] == "running")
    except (ValueError, KeyError):
        return False


def _program(name: str) -> str:
    """The command of this very installation, so that the tour works without an activated .venv."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name
