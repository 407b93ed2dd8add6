"""A small signed apt archive, made with dpkg-deb and gpg; nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import random
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path

DAY = 86400.0


class Keyring:
    """Throw-away OpenPGP keys. `good` signs the archive, `other` is nobody's, `expired` has been good."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(mode=0o700)
        self._then = int(time.time() - 10 * DAY)
        """When the expired key was good."""
        for name, until in (("good", "0"), ("other", "0"), ("expired", "seconds=60")):
            when = ["--faked-system-time", f"{self._then}!"] if name == "expired" else []
            self.gpg(*when, "--passphrase", "", "--quick-gen-key", f"{name} <{name}@test>", "ed25519", "sign", until)

    def gpg(self, *words: str, data: bytes | None = None) -> bytes:
        command = ["gpg", "--homedir", str(self.home), "--batch", "--no-tty", "--pinentry-mode", "loopback", *words]
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout

    def export(self, path: Path, *names: str, armor: bool = False) -> Path:
        path.write_bytes(self.gpg(*(["--armor"] if armor else []), "--export", *(f"{name}@test" for name in names)))
        return path

    def clearsign(self, text: bytes, name: str = "good") -> bytes:
        return self._sign(text, name, "--clearsign")

    def detached(self, text: bytes, name: str = "good") -> bytes:
        return self._sign(text, name, "--armor", "--detach-sign")

    def _sign(self, text: bytes, name: str, *how: str) -> bytes:
        when = ["--faked-system-time", f"{self._then}!"] if name == "expired" else []
        return self.gpg(*when, "--digest-algo", "SHA512", "--local-user", f"{name}@test", *how, data=text)

    def close(self) -> None:
        subprocess.run(["gpgconf", "--homedir", str(self.home), "--kill", "all"], check=False, capture_output=True)


@dataclass
class Archive:
    """`root`: what its web server serves; `suite` "./": a flat archive."""

    root: Path
    keyring: Keyring
    suite: str = "stable"
    packages: dict[str, Path] = field(default_factory=dict)

    @property
    def release(self) -> Path:
        return self.root if self.suite == "./" else self.root / "dists" / self.suite

    def add(self, name: str, size: int = 20_000, version: str = "1.0", seed: int = 1) -> Path:
        """A package with `size` random bytes in it; returns the .deb."""
        tree = self.root.parent / f"tree-{name}"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / f"opt/{name}").mkdir(parents=True)
        with (tree / f"opt/{name}/data").open("wb") as file:
            noise = random.Random(f"{name} {version} {seed}")
            for done in range(0, size, 1 << 20):
                file.write(noise.randbytes(min(1 << 20, size - done)))
        (tree / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: Test <test@test>\n"
            f"Description: a package\n of the test\n"
        )
        pool = self.root if self.suite == "./" else self.root / "pool/main" / name[0] / name
        pool.mkdir(parents=True, exist_ok=True)
        target = pool / f"{name}_{version}_amd64.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, target], check=True, capture_output=True
        )
        shutil.rmtree(tree)
        self.packages[name] = target
        return target

    def publish(
        self,
        *,
        key: str = "good",
        age: float = 0.0,
        valid: float | None = 7 * DAY,
        inline: bool = True,
        signed: bool = True,
        lie: dict[str, bytes] | None = None,
    ) -> None:
        """Write the indexes and the Release. `age`, `valid`: seconds before now of its date, and for how
        long it holds from then on. `lie`: path -> what it is said to hold, whatever it does."""
        paragraphs = []
        for path in self.packages.values():
            control = subprocess.run(["dpkg-deb", "-f", path], capture_output=True, text=True, check=True).stdout
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            place = path.relative_to(self.root)
            where = f"./{place}" if self.suite == "./" else str(place)
            paragraphs.append(f"{control}Filename: {where}\nSize: {path.stat().st_size}\nSHA256: {digest}\n")
        text = "\n".join(paragraphs).encode()
        below = "" if self.suite == "./" else "main/binary-amd64/"
        indexes = {f"{below}Packages": text, f"{below}Packages.xz": lzma.compress(text, preset=0)}
        if self.suite != "./":
            indexes["main/i18n/Translation-en"] = b"Package: none\n"
            indexes["main/i18n/Translation-en.gz"] = gzip.compress(b"Package: none\n", mtime=0)
            indexes |= self.more
        for name, data in indexes.items():
            self._write(self.release / name, data)
            directory = (self.release / name).parent
            self._write(directory / "by-hash/SHA256" / hashlib.sha256(data).hexdigest(), data)
        date = self._now() - age
        lines = [
            f"Origin: Test\nSuite: {self.suite.strip('./') or 'flat'}\nCodename: test",
            f"Date: {formatdate(date, usegmt=True)}",
            *([f"Valid-Until: {formatdate(date + valid, usegmt=True)}"] if valid is not None else []),
            "Acquire-By-Hash: yes\nArchitectures: amd64\nComponents: main\nSHA256:",
        ]
        for name, data in indexes.items():
            said = (lie or {}).get(name, data)
            lines.append(f" {hashlib.sha256(said).hexdigest()} {len(said)} {name}")
        release = ("\n".join(lines) + "\n").encode()
        for name in ("InRelease", "Release", "Release.gpg"):
            (self.release / name).unlink(missing_ok=True)
        if inline:
            self._write(self.release / "InRelease", self.keyring.clearsign(release, key) if signed else release)
        else:
            self._write(self.release / "Release", release)
            if signed:
                self._write(self.release / "Release.gpg", self.keyring.detached(release, key))
        os.utime(self.release / ("InRelease" if inline else "Release"), (date, date))

    def _now(self) -> float:
        """The date of this edition, in another second than the last one's: HTTP's dates are of whole seconds,
        so that who asks whether it has changed since would else hear that it has not."""
        time.sleep(max(0.0, int(self._published) + 1 - time.time()))
        self._published = time.time()
        return self._published

    more: dict[str, bytes] = field(default_factory=dict)
    """Further indexes: path below the Release -> content."""
    _published: float = field(default=0.0, init=False)

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
