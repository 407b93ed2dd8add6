"""Debian packages without root and without touching the machine's own apt: resolve, lock, download.

A private apt (own directories, empty dpkg status) does the resolving and the signature checks; the
result is a list of packages with version and SHA-256, which is what the lock file records and what
every download is checked against.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from debian.deb822 import Packages

from hostos.build.run import require, run
from hostos.errors import FAILED, UserError, failure
from hostos.paths import cache_dir, private_dir
from hostos.steps import Step

DEB_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DOWNLOADS_AT_ONCE = 4
TIMEOUT_S = 60
# A mirror behind a busy line or a name server that hiccups is asked again, a little later each time.
ATTEMPTS = 4
PAUSE_S = 2.0


@dataclass(frozen=True, order=True)
class Package:
    """One binary package. `path`: below the mirror (`pool/main/…`); `size` in bytes."""

    name: str
    version: str
    arch: str
    path: str
    size: int
    sha256: str
    source: str
    depends: str = ""

    @property
    def file_name(self) -> str:
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.arch}.deb"


@dataclass(frozen=True)
class Mirror:
    """Where packages come from; `security` is empty when the machine has no security archive."""

    main: str
    security: str = ""


def find_mirror() -> Mirror:
    """The mirror to use: `HOSTOS_MIRROR`, else what this machine's apt is configured with, else the
    default of mmdebstrap.

    Raises `UserError` when none of them gives one.
    """
    if configured := os.environ.get("HOSTOS_MIRROR"):
        return Mirror(configured.rstrip("/"), os.environ.get("HOSTOS_SECURITY_MIRROR", "").rstrip("/"))
    main = security = ""
    if shutil.which("apt-get"):
        # Only indexes that `apt-get update` has fetched know their origin, so the URI is asked for too.
        listing = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)", "Created-By: Packages"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        for line in listing.splitlines():
            uri, _, origin = line.partition(" ")
            if origin == "Debian Debian":
                main = main or uri.rstrip("/")
            elif origin == "Debian Debian-Security":
                security = security or uri.rstrip("/")
    if not main and shutil.which("mmdebstrap"):
        # Ask the tool for its defaults instead of naming hosts here: a dry run shows what it fetches from.
        shown = subprocess.run(
            ["mmdebstrap", "--simulate", "--verbose", "--mode=root", "--variant=extract", "--format=null", "trixie"],
            capture_output=True,
            text=True,
            check=False,
        )
        found = re.findall(
            r"^(?:Get|Hit):\d+ (\S+) (trixie|trixie-security) InRelease", shown.stderr + shown.stdout, re.M
        )
        by_suite = {suite: uri.rstrip("/") for uri, suite in found}
        main, security = by_suite.get("trixie", ""), by_suite.get("trixie-security", "")
    if not main:
        raise UserError(
            "no Debian mirror is known on this machine",
            "run `apt-get update` first, or name one: HOSTOS_MIRROR=<url of a Debian mirror> invoke build",
        )
    return Mirror(main, security)


class Archive:
    """A Debian suite as seen through a private apt in the cache directory."""

    def __init__(self, suite: str, arch: str) -> None:
        self.suite = suite
        self.arch = DEB_ARCH[arch]
        self.root = cache_dir() / "apt" / f"{suite}-{self.arch}"
        self.pool = cache_dir() / "debs"

    def _options(self) -> list[str]:
        return [
            "-o", f"Dir={self.root}",
            "-o", f"Dir::State={self.root}/state",
            "-o", f"Dir::State::status={self.root}/status",
            "-o", f"Dir::Cache={self.root}/cache",
            "-o", f"Dir::Etc={self.root}/etc",
            "-o", "Dir::Log=/dev/null",
            "-o", f"APT::Architecture={self.arch}",
            "-o", f"APT::Architectures={self.arch}",
            "-o", "APT::Install-Recommends=false",
            "-o", "APT::Sandbox::User=",
            "-o", "Acquire::Languages=none",
            "-o", f"Acquire::Retries={ATTEMPTS}",
            "-o", f"Acquire::http::Timeout={TIMEOUT_S}",
            "-o", "Debug::NoLocking=true",
        ]  # fmt: skip

    def _env(self) -> dict[str, str]:
        # An APT_CONFIG of our own keeps the machine's /etc/apt/apt.conf.d out of the result.
        return {"APT_CONFIG": str(self.root / "apt.conf"), "LC_ALL": "C.UTF-8"}

    def update(self, step: Step) -> None:
        """Fetch the suite's signed index. Raises `UserError` when that fails."""
        require("apt-get", "apt-cache", "dpkg-deb")
        if not KEYRING.exists():
            raise UserError(
                f"the keys that sign Debian's archive are missing ({KEYRING})",
                "apt-get install debian-archive-keyring",
            )
        mirror = find_mirror()
        for part in ("state/lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
            private_dir(self.root / part)
        (self.root / "status").touch()
        (self.root / "apt.conf").write_text('Dir::Etc::parts "/dev/null";\n')
        signed = f"[signed-by={KEYRING}]"
        lines = [
            f"deb {signed} {mirror.main} {self.suite} main",
            f"deb {signed} {mirror.main} {self.suite}-updates main",
        ]
        if mirror.security:
            lines.append(f"deb {signed} {mirror.security} {self.suite}-security main")
        (self.root / "etc/sources.list").write_text("\n".join(lines) + "\n")
        (self.root / "mirrors").write_text("\n".join(filter(None, (mirror.main, mirror.security))) + "\n")
        step.progress(f"index of {self.suite}")
        run(["apt-get", *self._options(), "-q", "-o", "APT::Update::Error-Mode=any", "update"], env=self._env())

    def resolve(self, names: Sequence[str]) -> list[Package]:
        """`names` and everything they depend on (no recommendations), sorted by name.

        Raises `UserError` naming a package that does not exist in the suite.
        """
        output = run(
            ["apt-get", *self._options(), "install", "--print-uris", "-qq", "-y", *names],
            env=self._env(),
        )
        wanted = {}
        for found in re.finditer(r"^'([^']+)' (\S+) (\d+)", output, re.M):
            wanted[found[2]] = found[1]
        if not wanted:
            raise failure(f"apt resolved no package at all for {self.suite}", "invoke build --update")
        versions = []
        for file_name in wanted:
            name, version, _ = file_name.split("_")
            versions.append(f"{name}={version.replace('%3a', ':')}")
        return sorted(self._describe(versions))

    def _describe(self, exact: Sequence[str]) -> list[Package]:
        output = run(["apt-cache", *self._options(), "show", *exact], env=self._env())
        found: dict[str, Package] = {}
        for entry in Packages.iter_paragraphs(output, use_apt_pkg=False):
            key = f"{entry['Package']}={entry['Version']}"
            if key in found or key not in exact:
                continue
            found[key] = Package(
                name=entry["Package"],
                version=entry["Version"],
                arch=entry["Architecture"],
                path=entry["Filename"],
                size=int(entry["Size"]),
                sha256=entry["SHA256"],
                source=str(entry.get("Source", entry["Package"])).split(" ")[0],
                depends=", ".join(filter(None, (entry.get("Pre-Depends", ""), entry.get("Depends", "")))),
            )
        if lost := sorted(set(exact) - set(found)):
            raise failure(f"{self.suite} does not describe {', '.join(lost)}", "invoke build --update")
        return list(found.values())

    def fetch(self, packages: Sequence[Package], step: Step) -> list[Path]:
        """The files of `packages`, downloaded where the cache lacks them, in the given order.

        Every file's SHA-256 is checked when it is downloaded. Raises `UserError` (status 1) when a
        mirror no longer has one, or sends something else.
        """
        private_dir(self.pool)
        missing = [package for package in packages if not (self.pool / package.file_name).exists()]
        if missing:
            mirrors = self._mirrors()
            total = sum(package.size for package in missing)
            done = 0
            with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as workers:
                for package in workers.map(lambda item: self._download(item, mirrors), missing):
                    done += package.size
                    step.progress(f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, {package.name}")
        return [self.pool / package.file_name for package in packages]

    def _mirrors(self) -> list[str]:
        recorded = self.root / "mirrors"
        if recorded.exists():
            return recorded.read_text().split()
        mirror = find_mirror()
        return [item for item in (mirror.main, mirror.security) if item]

    def _download(self, package: Package, mirrors: Sequence[str]) -> Package:
        target = self.pool / package.file_name
        partial = target.with_name(f"{target.name}.{os.getpid()}.part")
        reasons: dict[str, str] = {}
        gone: set[str] = set()
        try:
            for attempt in range(ATTEMPTS):
                time.sleep(attempt * PAUSE_S)
                for mirror in mirrors:
                    if mirror in gone:
                        continue
                    try:
                        digest = _fetch(f"{mirror}/{package.path}", partial)
                    except HTTPError as error:
                        reasons[mirror] = str(error)
                        if error.code in (404, 410):
                            gone.add(mirror)
                        continue
                    except OSError as error:
                        reasons[mirror] = str(error)
                        continue
                    if digest == package.sha256:
                        partial.replace(target)
                        return package
                    reasons[mirror] = f"SHA-256 is {digest}, expected {package.sha256}"
                if len(gone) == len(mirrors):
                    break
        finally:
            partial.unlink(missing_ok=True)
        said = "\n    ".join(f"{mirror}: {reason}" for mirror, reason in reasons.items())
        message = f"{package.name} {package.version} could not be fetched:\n    {said}"
        if len(gone) == len(mirrors):
            raise Gone(
                message, "the mirror has moved on; take the newest packages: invoke build --update", status=FAILED
            )
        raise failure(message, "try again: what was fetched is kept")


class Gone(UserError):  # noqa: N818
    """No mirror has the package any more."""


def _fetch(url: str, into: Path) -> str:
    """Download `url`; returns its SHA-256. Raises OSError."""
    digest = hashlib.sha256()
    with urlopen(url, timeout=TIMEOUT_S) as answer, into.open("wb") as out:
        while block := answer.read(1 << 20):
            digest.update(block)
            out.write(block)
    return digest.hexdigest()
