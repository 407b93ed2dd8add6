"""SSH public keys as people hand them over.

Formats: authorized_keys lines (sshd(8)), RFC 4716, key blobs of RFC 4253 §6.6, RFC 5656, RFC 8709
and OpenSSH's PROTOCOL.u2f.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError

MAX_FILE = 64 * 1024
# sshd's RequiredRSASize, OpenSSH 10.
MIN_RSA_BITS = 1024

# Type -> number of strings that follow the type in the blob.
_FIELDS = {
    "ssh-ed25519": 1,
    "ssh-rsa": 2,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "sk-ssh-ed25519@openssh.com": 2,
    "sk-ecdsa-sha2-nistp256@openssh.com": 3,
}
_PRIVATE = re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----|PuTTY-User-Key-File-\d")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class PublicKey:
    """One key that sshd will accept; `blob` is the decoded key, `comment` may be empty."""

    type: str
    blob: bytes
    comment: str = ""

    @property
    def line(self) -> str:
        """The key as one line of authorized_keys."""
        parts = [self.type, base64.b64encode(self.blob).decode(), self.comment]
        return " ".join(part for part in parts if part)


def read_public_keys(path: Path) -> tuple[PublicKey, ...]:
    """The keys in the file `path`; raises UserError naming the file and what is wrong with it."""
    path = path.expanduser()
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"key file {path} does not exist", _missing_hint(path)) from None
    except IsADirectoryError:
        raise UserError(f"key file {path} is a directory", _missing_hint(path / "id_ed25519")) from None
    except OSError as error:
        raise UserError(f"key file {path} cannot be read: {error.strerror}", "check its owner and mode") from None
    if len(data) > MAX_FILE:
        raise UserError(f"key file {path} is over {MAX_FILE // 1024} KiB: not a public key", _how_to_make())
    return parse_public_keys(data, source=path)


def parse_public_keys(data: bytes, *, source: Path) -> tuple[PublicKey, ...]:
    """The keys in `data`, which came from `source` (used in messages only); at least one.

    Takes any line ends, a byte order mark, blank lines, `#` comments, several keys (repeated ones
    once) and RFC 4716 files. Raises UserError for anything else; never quotes key material.
    """
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace")
    if _PRIVATE.search(text):
        raise UserError(f"{source} is a private key", _public_half_hint(source, text))
    if re.search(r"^-----BEGIN [A-Z ]*PUBLIC KEY-----", text, re.MULTILINE):
        raise UserError(f"{source} is a public key in PEM format", f"convert it: ssh-keygen -i -m PKCS8 -f {source}")
    if "---- BEGIN SSH2 PUBLIC KEY ----" in text:
        keys = [_parse_rfc4716(text, source)]
    else:
        lines = [(number, line.strip()) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1)]
        keys = [_parse_line(line, f"{source}, line {number}") for number, line in lines if line and line[0] != "#"]
    if not keys:
        raise UserError(f"{source} holds no key", _how_to_make())
    return tuple({key.blob: key for key in reversed(keys)}.values())[::-1]


def _parse_line(line: str, where: str) -> PublicKey:
    # As sshd splits them: at blanks and tabs, the rest of the line being the comment.
    kind, encoded, comment, *_ = [*line.split(None, 2), "", ""]
    if "-cert-v01@openssh.com" in kind:
        raise UserError(f"{where}: a certificate, not a key", "give the .pub file the certificate was made from")
    if kind == "ssh-dss":
        raise UserError(f"{where}: DSA keys are no longer accepted by sshd", _how_to_make())
    if kind not in _FIELDS:
        if re.search(rf"(?:^|[ ,\"])(?:{'|'.join(map(re.escape, _FIELDS))})[ \t]+AAAA", line):
            raise UserError(
                f"{where}: options before the key are not taken",
                "give the key alone; restrict it in the guest's /root/.ssh/authorized_keys",
            )
        raise UserError(f"{where}: not an SSH public key", _how_to_make())
    try:
        blob = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        blob = b""
    return _checked(kind, blob, comment, where)


def _parse_rfc4716(text: str, source: Path) -> PublicKey:
    body = text.split("---- BEGIN SSH2 PUBLIC KEY ----", 1)[1].split("---- END SSH2 PUBLIC KEY ----", 1)[0]
    # RFC 4716 §3.3: a header line ending in a backslash goes on in the next.
    lines = re.sub(r"\\(\r\n|\r|\n)", "", body).splitlines()
    comment = ""
    for line in lines:
        if line.lower().startswith("comment:"):
            comment = line.partition(":")[2].strip().strip('"')
    try:
        blob = base64.b64decode("".join(line.strip() for line in lines if ":" not in line), validate=True)
    except binascii.Error:
        blob = b""
    kind = (_strings(blob) or [b""])[0].decode("ascii", "replace")
    return _checked(kind, blob, comment, str(source))


def _checked(kind: str, blob: bytes, comment: str, where: str) -> PublicKey:
    fields = _strings(blob)
    if fields is None or kind not in _FIELDS or fields[0] != kind.encode() or len(fields) != 1 + _FIELDS[kind]:
        raise UserError(f"{where}: the key is damaged or cut off", "copy the .pub file again, as one line")
    if kind == "ssh-ed25519" and len(fields[1]) != 32:
        raise UserError(f"{where}: the key is damaged or cut off", "copy the .pub file again, as one line")
    if kind == "ssh-rsa" and (bits := int.from_bytes(fields[2], "big").bit_length()) < MIN_RSA_BITS:
        raise UserError(f"{where}: an RSA key of {bits} bits is refused by sshd", _how_to_make())
    return PublicKey(kind, blob, _CONTROL.sub("", comment))


def _strings(blob: bytes) -> list[bytes] | None:
    """The strings (RFC 4251 §5) that `blob` consists of, None unless it consists of strings."""
    found = []
    while blob:
        length = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + length or len(blob) < 4:
            return None
        found.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    return found or None


def _how_to_make() -> str:
    return "make a key: ssh-keygen -t ed25519, then --key ~/.ssh/id_ed25519.pub"


def _missing_hint(path: Path) -> str:
    with_suffix = path.with_name(path.name + ".pub")
    if with_suffix.is_file():
        return f"did you mean --key {with_suffix}?"
    try:
        near = sorted(path.parent.glob("*.pub")) or sorted((Path.home() / ".ssh").glob("*.pub"))
    except (OSError, RuntimeError):
        near = []
    if near:
        return "there is " + ", ".join(str(each) for each in near[:3])
    return _how_to_make() + "; without --key hostos makes one"


def _public_half_hint(source: Path, text: str) -> str:
    public = source.with_name(source.name + ".pub")
    if public.is_file():
        return f"give its public half: --key {public}"
    if text.startswith("PuTTY"):
        return f"write its public half: puttygen {source} -O public-openssh -o {public}, then --key {public}"
    return f"write its public half: ssh-keygen -y -f {source} > {public}, then --key {public}"
