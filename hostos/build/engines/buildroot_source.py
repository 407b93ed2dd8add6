"""Buildroot itself: one pinned release, fetched once, verified by its commit, never changed."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hostos.build import cache
from hostos.build.run import require, run
from hostos.errors import UserError, failure
from hostos.steps import Step

# The long-term release 2026.02.x. A git commit names every byte of it.
RELEASE = "2026.02.3"
COMMIT = "679b9ead7620bbf193620d1ebf56f53c1764d37a"
UPSTREAM = "https://gitlab.com/buildroot.org/buildroot.git"


@dataclass(frozen=True)
class Source:
    """A Buildroot tree. `commit` is empty for an unpacked release archive, whose commit is unknown;
    `changed`: its working files differ from that commit."""

    path: Path
    release: str
    commit: str
    changed: bool = False

    @property
    def provenance(self) -> str:
        return f"{self.release} {self.commit or '(archive)'}{' with local changes' if self.changed else ''}"


def obtain(wanted: str | None, step: Step) -> Source:
    """The pinned Buildroot: from `wanted` (a work tree, an unpacked archive, a git repository's path
    or URL), else from upstream into the cache.

    Raises `UserError` when `wanted` is not Buildroot or another commit, or nothing can be fetched.
    """
    if wanted is None:
        return _checkout(UPSTREAM, step)
    path = Path(wanted).expanduser()
    if re.match(r"[a-z+]+://|[\w.-]+@[\w.-]+:", wanted) or _is_bare(path):
        return _checkout(wanted if not path.exists() else str(path.resolve()), step)
    if not path.is_dir():
        raise UserError(
            f"--buildroot-source {wanted}: there is no such directory",
            "a Buildroot work tree, a git repository or its URL; without the option it is fetched from upstream",
        )
    return _inspect(path.resolve())


def kernel_version(source: Source, series: str) -> str:
    """The newest kernel of a series (`6.12`) whose hash this Buildroot release records.

    Raises `UserError` when it records none.
    """
    pattern = re.compile(rf"^sha256\s+[0-9a-f]{{64}}\s+linux-({re.escape(series)}\.\d+)\.tar\.xz$", re.M)
    files = source.path.glob("linux/*/linux.hash")
    found: set[str] = {version for file in files for version in pattern.findall(file.read_text())}
    if not found:
        raise UserError(
            f"Buildroot {source.release} records no kernel {series}.x",
            "choose another kernel_series in the profile's [buildroot] table",
        )
    return max(found, key=lambda version: int(version.rpartition(".")[2]))


def kernel_hashes(source: Source, version: str) -> str:
    """The text of the hash file in which Buildroot records the kernel `version`, and its licences."""
    texts = (file.read_text() for file in sorted(source.path.glob("linux/*/linux.hash")))
    return next(text for text in texts if f"  linux-{version}.tar.xz" in text)


def _is_bare(path: Path) -> bool:
    return (path / "HEAD").is_file() and (path / "objects").is_dir()


def _checkout(url: str, step: Step) -> Source:
    target = cache.root() / "buildroot-source" / COMMIT
    if (target / "Makefile").is_file():
        return _inspect(target)
    require("git")
    step.progress(f"fetching Buildroot {RELEASE}")
    partial = target.with_name(f".{COMMIT}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        run(["git", "init", "--quiet", partial])
        try:
            fetch = ["git", "-C", str(partial), "fetch", "--quiet", "--depth", "1", url, COMMIT]
            run(fetch, env={"GIT_TERMINAL_PROMPT": "0"})
        except UserError as error:
            raise failure(
                f"Buildroot {RELEASE} could not be fetched from {url}:\n{error.message.partition(chr(10))[2]}",
                "name a copy of it: --buildroot-source <directory or git repository that has the tag "
                f"{RELEASE}, commit {COMMIT[:12]}>",
            ) from None
        run(["git", "-C", partial, "checkout", "--quiet", "--detach", "FETCH_HEAD"])
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _inspect(target)


def _inspect(path: Path) -> Source:
    makefile = path / "Makefile"
    found = re.search(r"^export BR2_VERSION := (\S+)", makefile.read_text(), re.M) if makefile.is_file() else None
    if found is None:
        raise UserError(f"{path} is no Buildroot tree", f"it should hold Buildroot {RELEASE}")
    release = found[1]
    if not (path / ".git").exists():
        if release != RELEASE:
            raise UserError(f"{path} is Buildroot {release}, hostos is made for {RELEASE}", _how(path))
        return Source(path, release, "")
    commit = _git(path, "rev-parse", "HEAD")
    if commit != COMMIT:
        raise UserError(
            f"{path} is at commit {commit[:12]} (Buildroot {release}), hostos is made for {COMMIT[:12]} ({RELEASE})",
            _how(path),
        )
    return Source(path, release, commit, bool(_git(path, "status", "--porcelain", "--untracked-files=no")))


def _how(path: Path) -> str:
    return f"git -C {path} checkout {COMMIT[:12]}   (or leave --buildroot-source out)"


def _git(path: Path, *words: str) -> str:
    # A tree that belongs to somebody else is only read here.
    command = ["git", "-c", f"safe.directory={path}", "-C", str(path), *words]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise failure(f"git cannot read {path}: {answer.stderr.strip()}", "name another --buildroot-source")
    return answer.stdout.strip()
