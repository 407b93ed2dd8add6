"""OpenPGP signatures of archives, checked by gpgv with the keys that apt itself trusts.

The rules are apt's (apt-key, methods/gpgv.cc): at least one good signature by a known key that is
neither expired nor revoked, none that is bad, and no digest that is broken. gpgv's status lines:
doc/DETAILS of GnuPG.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError
from hostos.mirror.errors import UnverifiedError

HEADER = b"-----BEGIN PGP SIGNED MESSAGE-----"
TRUSTED = (Path("/etc/apt/trusted.gpg"), Path("/etc/apt/trusted.gpg.d"))
DEADLINE_S = 20.0
_WEAK = {"1", "2", "3"}
"""MD5, SHA-1, RIPEMD-160 (RFC 9580, section 9.5)."""
_FINGERPRINT = re.compile(r"[0-9A-F]{40}!?")


@dataclass(frozen=True)
class Keys:
    """Who may sign: `files` with keys and, if not empty, only those with one of `fingerprints`
    (with `!`: that very subkey), as apt's Signed-By says it. `armored`: keys given in full."""

    files: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    armored: str = ""

    @classmethod
    def parse(cls, signed_by: str) -> Keys:
        """From the value of a Signed-By field or option; empty: the keys apt trusts for everything."""
        if "BEGIN PGP PUBLIC KEY BLOCK" in signed_by:
            lines = [line.strip() for line in signed_by.splitlines()]
            # deb822 writes an empty line as a dot.
            return cls(armored="\n".join("" if line == "." else line for line in lines).strip() + "\n")
        words = [word for word in re.split(r"[,\s]+", signed_by) if word]
        files = tuple(word for word in words if word.startswith("/"))
        prints = tuple(word.upper() for word in words if not word.startswith("/"))
        for word in prints:
            if not _FINGERPRINT.fullmatch(word):
                raise UserError(f"Signed-By: {word!r} is neither a file nor a fingerprint", "man 5 sources.list")
        return cls(files, prints)

    def rings(self, directory: Path) -> list[str]:
        """The key files as gpgv takes them: armored ones are converted, into `directory`."""
        found: list[Path] = [Path(name) for name in self.files]
        if not found and not self.armored:
            for place in TRUSTED:
                found += sorted(place.glob("*.[ga][ps][gc]")) if place.is_dir() else [place]
        blobs = []
        for path in found:
            try:
                blobs.append(path.read_bytes())
            except OSError:
                continue  # apt does the same: a missing key makes the signature unknown
        if self.armored:
            blobs.append(self.armored.encode())
        rings = []
        for number, blob in enumerate(blobs):
            ring = directory / f"keys{number}.gpg"
            ring.write_bytes(dearmor(blob))
            rings.append(str(ring))
        return rings


def dearmor(blob: bytes) -> bytes:
    """Binary keys from an armored file (RFC 9580, section 6.2); what is binary already stays as it is."""
    if b"-----BEGIN PGP PUBLIC KEY BLOCK-----" not in blob:
        return blob
    out = b""
    for block in re.findall(rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(.*?)-----END", blob, re.S):
        _, _, body = block.replace(b"\r", b"").partition(b"\n\n")
        lines = [line for line in (body or block).split(b"\n") if line and not line.startswith(b"=")]
        try:
            out += base64.b64decode(b"".join(lines), validate=True)
        except binascii.Error:
            return b""
    return out


async def verify_inline(data: bytes, keys: Keys, what: str) -> bytes:
    """The signed text of a clear-signed file. Raises UnverifiedError."""
    if not data.lstrip().startswith(HEADER):
        raise UnverifiedError(f"{what} is not signed")
    if data.count(b"\n-----BEGIN PGP SIGNED") or not data.rstrip().endswith(b"-----END PGP SIGNATURE-----"):
        raise UnverifiedError(f"{what} has text outside of its signature")
    with tempfile.TemporaryDirectory(prefix="hostos-gpgv-") as name:
        directory = Path(name)
        (directory / "signed").write_bytes(data)
        text = directory / "text"
        await _gpgv(["--output", str(text), str(directory / "signed")], keys, what, directory)
        return text.read_bytes()


async def verify_detached(data: bytes, signature: bytes, keys: Keys, what: str) -> None:
    """Raises UnverifiedError unless `signature` is a good one of `data`."""
    with tempfile.TemporaryDirectory(prefix="hostos-gpgv-") as name:
        directory = Path(name)
        (directory / "data").write_bytes(data)
        (directory / "signature").write_bytes(signature)
        await _gpgv([str(directory / "signature"), str(directory / "data")], keys, what, directory)


async def _gpgv(arguments: Sequence[str], keys: Keys, what: str, directory: Path) -> None:
    rings = await asyncio.to_thread(keys.rings, directory)
    if not rings:
        raise UnverifiedError(f"{what}: there are no keys to check it with")
    command = ["gpgv", "--homedir", str(directory), "--status-fd", "1"]
    for ring in rings:
        command += ["--keyring", ring]
    check(await status_of([*command, *arguments], what), keys.fingerprints, what)


async def status_of(command: Sequence[str], what: str) -> list[list[str]]:
    """The words of each status line that gpg or gpgv writes to stdout. Raises UnverifiedError."""
    if shutil.which(command[0]) is None:
        raise UnverifiedError(f"{what} can't be checked: {command[0]} is not installed")
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    except BaseException as error:
        if process.returncode is None:
            process.kill()
            await process.wait()
        if isinstance(error, TimeoutError):
            raise UnverifiedError(f"{what}: {command[0]} took longer than {DEADLINE_S:.0f} s") from None
        raise
    lines = output.decode(errors="replace").splitlines()
    return [line.split()[1:] for line in lines if line.startswith("[GNUPG:] ")]


def check(status: Sequence[Sequence[str]], fingerprints: Sequence[str], what: str) -> None:
    """Raises UnverifiedError unless the status lines show a signature that counts."""
    problems: list[str] = []
    good = False
    after_good = False
    for word, *rest in (line for line in status if line):
        if word == "BADSIG":
            raise UnverifiedError(f"{what} has a bad signature (key {rest[0]})")
        if word in ("EXPKEYSIG", "REVKEYSIG", "EXPSIG"):
            kind = {"EXPKEYSIG": "expired key", "REVKEYSIG": "revoked key", "EXPSIG": "expired signature"}[word]
            problems.append(f"{kind} {rest[0]}")
        elif word == "NO_PUBKEY":
            problems.append(f"unknown key {rest[0]}")
        if word == "VALIDSIG" and after_good:
            signer, digest, primary = rest[0], rest[7], rest[-1]
            if digest in _WEAK:
                problems.append(f"a weak digest, by key {signer}")
            elif fingerprints and not {f"{signer}!", signer, primary} & set(fingerprints):
                problems.append(f"key {primary}, which Signed-By does not name")
            else:
                good = True
        if word != "KEY_CONSIDERED":
            after_good = word == "GOODSIG" or (after_good and word in ("NOTATION_NAME", "NOTATION_DATA", "POLICY_URL"))
    if not good:
        raise UnverifiedError(f"{what} is not signed by a trusted key: {', '.join(problems) or 'no signature'}")
