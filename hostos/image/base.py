"""First layers: a distribution from its mirror, without a daemon and without being root of anything."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hostos.errors import UserError, failure
from hostos.image import package_cache, sandbox, unpacked
from hostos.image.buildcache import Package, Packages
from hostos.image.entries import Entry, arrange
from hostos.image.pacman_database import timeless
from hostos.image.recipe import Base
from hostos.image.sandbox import Ids
from hostos.image.sources import read_plain_tar
from hostos.steps import Steps

if TYPE_CHECKING:
    from hostos.image.pins import Pins

DEBIAN_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "armhf",
    "riscv64": "riscv64",
    "ppc64le": "ppc64el",
    "s390x": "s390x",
}
PACMAN_MIRRORS = Path("/etc/pacman.d/mirrorlist")
"""Arch's mirrors as this host knows them; Debian's pacman brings none."""
TAIL = 12
"""Lines of a log that an error shows."""
_OF_THE_HOST = (b"etc/hostname", b"etc/resolv.conf")
_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy")


@dataclass(frozen=True)
class Fetched:
    entries: list[Entry]
    packages: Packages


def fetch(
    base: Base,
    architecture: str,
    epoch: int,
    who: Ids,
    log: Path,
    stack: ExitStack,
    steps: Steps,
    pins: Pins | None = None,
) -> Fetched:
    """The tree of a distribution (`debian`, `ubuntu` or `arch`); of `pins`, with no network at all.

    Raises UserError, with the log's last lines.
    """
    tool = {"arch": "pacman"}.get(base.kind, "mmdebstrap")
    if not shutil.which(tool):
        package = {"pacman": "pacman-package-manager (Debian), pacman (Arch)"}.get(tool, tool)
        raise UserError(f"{tool} is needed for a base of {base.kind}", f"install {package}")
    work = sandbox.own(sandbox.scratch() / f"base-{os.getpid()}", who)
    stack.callback(unpacked.remove, work, who)
    if base.key:
        # Where those in the sandbox can read it.
        base = replace(base, key=f"/tmp/{_copied(Path(base.key), work).name}")
    tar = stack.enter_context((log.parent / f"{log.name}.tar").open("w+b"))
    (log.parent / f"{log.name}.tar").unlink()
    command = _pacman(base, architecture, pins) if base.kind == "arch" else _mmdebstrap(base, architecture, pins)
    cache = {} if pins else package_cache.for_base(base)
    env = cache | environment(epoch) | {"TMPDIR": "/tmp", "HOME": "/tmp"}

    def build() -> int:
        sandbox.mount(str(work), "/tmp", None, sandbox.MS_BIND)
        os.dup2(tar.fileno(), 9)
        return sandbox.execute(["sh", "-euc", command], env=env)

    with steps.step(f"{base.kind} {base.value}".strip()) as step:
        try:
            logged(build, log, who, network=pins is None, what=f"building the base {base.kind} {base.value}".strip())
        except UserError as error:
            if "NO_PUBKEY" in log.read_text(errors="replace"):
                package = {"ubuntu": "ubuntu-keyring", "debian": "debian-archive-keyring"}.get(base.kind, "")
                error.hint = f'name the archive\'s keyring: key = "FILE" below [base] (from its package {package})'
            raise
        tar.seek(0)
        entries, _ = read_plain_tar(tar, Path(f"{base.kind} {base.value}"), stack)
        kept = [each for each in entries if each.path not in _OF_THE_HOST]
        clamped = (replace(each, mtime=min(each.mtime, epoch)) for each in timeless(kept, epoch))
        found = arrange(clamped, base.kind)
        packages = _apt_packages(work / "packages") if base.kind != "arch" else {}
        step.detail = f"{len(packages)} packages, {len(found)} entries" if packages else f"{len(found)} entries"
    return Fetched(found, packages)


def _copied(key: Path, work: Path) -> Path:
    """The keyring for those in the sandbox. Raises UserError if it can't be read."""
    target = work / f"key{key.suffix}"
    try:
        target.write_bytes(key.read_bytes())
    except OSError as error:
        raise UserError(f"the keyring {key}: {error.strerror}", "`key` is a file, from the recipe on") from None
    target.chmod(0o644)
    return target


def _mmdebstrap(base: Base, architecture: str, pins: Pins | None) -> str:
    words = ["mmdebstrap", "--mode=root", "--format=tar", f"--variant={base.variant}"]
    if (name := DEBIAN_ARCHITECTURES.get(architecture)) is None:
        raise UserError(f"{base.kind} has no packages for {architecture}")
    words += [f"--architectures={name}", f"--components={','.join(base.components)}"]
    # In Ubuntu's least set there is no apt, without which no step could install anything.
    packages = (*base.packages, *(["apt"] if base.kind == "ubuntu" else []))
    if packages:
        words.append(f"--include={','.join(packages)}")
    if base.key:
        words.append(f"--keyring={base.key}")
    # Once everything is installed and the lists are still there: what each package's archive was.
    words.append(
        "--customize-hook=APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-cache show --no-all-versions "
        "$(chroot \"$1\" dpkg-query -W -f '${Package}=${Version} ') > /tmp/packages"
    )
    sources = pins.for_mmdebstrap() if pins else [each for each in (package_cache.mirror_of(base),) if each]
    if pins:
        lines = " ".join(shlex.quote(line) for line in pins.for_image())
        words.append(f"--customize-hook=printf '%s\\n' {lines} > \"$1/etc/apt/sources.list\"")
    quoted = " ".join(shlex.quote(word) for word in (*words, base.value, "-", *sources))
    return f"{quoted} >&9"


def _pacman(base: Base, architecture: str, pins: Pins | None) -> str:
    if not pins and not base.mirror and not PACMAN_MIRRORS.exists():
        raise UserError(
            "no mirror of Arch is known on this host", 'name one in the recipe: mirror = "URL/$repo/os/$arch"'
        )
    servers = f"Server = {base.mirror}" if base.mirror else f"Include = {PACMAN_MIRRORS}"
    packages = " ".join(shlex.quote(name) for name in base.packages or ("base",))
    # Signatures are checked with the host's keyring of Arch; a mirror of one's own may have none.
    level = "Never" if base.variant == "unsigned" else "Required DatabaseOptional"
    names = base.components if base.mirror else ("core", "extra")
    sections = pins.for_pacman() if pins else "".join(f"[{name}]\n{servers}\n" for name in names)
    config = f"[options]\nArchitecture = {architecture}\nSigLevel = {level}\n{sections}"
    root, lib = "/tmp/root", "/tmp/root/var/lib/pacman"
    empty = " ".join(f"{root}/{name}" for name in ("dev", "etc", "proc", "run", "sys", "tmp", "var/cache/pacman/pkg"))
    options = f"--root {root} --config /tmp/pacman.conf --cachedir /tmp/cache --logfile /tmp/pacman.log"
    return "\n".join(
        (
            f"printf %s {shlex.quote(config)} > /tmp/pacman.conf",
            f"mkdir -p {lib} {empty} && chmod 1777 {root}/tmp",
            f"pacman {options} --noconfirm --noprogressbar -Sy {packages}",
            f"rm -rf {lib}/sync",
            f"tar --numeric-owner --sort=name --xattrs --xattrs-include='*' --format=pax -C {root} -cf - . >&9",
        )
    )


def environment(epoch: int) -> dict[str, str]:
    """Of whatever a build runs: nothing of the user's but the way out to the network."""
    passed = {name: value for name, value in os.environ.items() if name.lower() in _PROXIES}
    return passed | {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "DEBIAN_FRONTEND": "noninteractive",
        "SOURCE_DATE_EPOCH": str(epoch),
    }


def logged(work: Callable[[], int], log: Path, who: Ids, *, network: bool, what: str) -> None:
    """Run it in the sandbox, all it says to `log`. Raises a failure with the last lines of that."""
    with log.open("wb") as file:
        status = sandbox.run(work, file.fileno(), network=network, who=who)
    if status:
        raise failure(f"{what} failed with status {status}:\n{tail(log)}", f"all it said: {log}")


def tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        lines = file.read().decode(errors="replace").splitlines()[-TAIL:]
    return "\n".join(f"  | {line}" for line in lines)


def _apt_packages(path: Path) -> Packages:
    """Records as `apt-cache show` prints them."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return {}
    found: Packages = {}
    for record in text.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in record.splitlines() if ": " in line)
        if "Package" in fields and "Version" in fields:
            found[fields["Package"]] = Package(fields["Version"], fields.get("SHA256", ""))
    return found
