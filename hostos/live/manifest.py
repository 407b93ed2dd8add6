"""What an image is: `manifest.json`, the first file of an image torrent (docs/images.md).

An image comes from strangers, so `Manifest.parse` takes nothing for granted: exact types, known
keys only, limits on every size. An image may say what to run (command, environment, user, working
directory, ports); everything that gives power over the machine is for the person who boots it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hostos.errors import UserError
from hostos.live.private import CIPHER, SECTOR

SCHEMA = 1
"""Schema of `manifest.json`; host and guest refuse any other."""

KIND = "hostos-image"

MAX_MANIFEST = 256 * 1024
"""Largest `manifest.json`, bytes."""
MAX_LAYERS = 64
MAX_PARENTS = 64
MAX_HISTORY = 1024
"""Longest description of a layer, bytes."""
MAX_LAYER_SIZE = 1 << 40
"""Largest layer, bytes (1 TiB)."""

FORMATS = ("squashfs",)

_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]|/(?=[A-Za-z0-9])){0,127}")
_LOOKS_LIKE_HASH = re.compile(r"[0-9a-fA-F]{8,}")
_ARCHITECTURE = re.compile(r"[a-z0-9_]{1,32}")
_LAYER_FILE = re.compile(r"hostos-[0-9a-f]{16}\.squashfs")
_ENV_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_USER = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,31})?)?")
_PORT = re.compile(r"([1-9][0-9]{0,4})/(tcp|udp)")


def check_name(name: str) -> str:
    """The name itself, if an image may be called that.

    A name is 1–128 letters, digits, `.`, `_`, `-` with `/` between parts, and can't be mistaken
    for (the beginning of) a hash. Raises UserError.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"not a usable image name: {name[:80]!r}",
            "use letters, digits, '.', '_', '-' and '/' between parts, e.g. --name web/debian-13",
        )
    if _LOOKS_LIKE_HASH.fullmatch(name):
        raise UserError(f"image name {name!r} reads like a hash", "add a letter beyond f, e.g. --name img-" + name)
    return name


def _text(value: Any, what: str, limit: int) -> str:
    if not isinstance(value, str):
        raise _bad(f"{what} is not a string")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise _bad(f"{what} is not UTF-8") from None
    if size > limit:
        raise _bad(f"{what} is longer than {limit} bytes")
    if "\0" in value:
        raise _bad(f"{what} contains a NUL byte")
    return value


def _bad(why: str) -> UserError:
    return UserError(f"image manifest: {why}", "the image is damaged or was made by another program")


def _number(value: Any, what: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _bad(f"{what} is not a number from {low} to {high}")
    return value


def _object(value: Any, what: str, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(f"{what} is not an object")
    required, optional = set(required), set(optional)
    if missing := required - value.keys():
        raise _bad(f"{what} lacks {sorted(missing)[0]!r}")
    if unknown := value.keys() - required - optional:
        raise _bad(f"{what} has the unknown key {sorted(unknown)[0][:40]!r}")
    return value


def _list(value: Any, what: str, limit: int) -> list[Any]:
    if not isinstance(value, list):
        raise _bad(f"{what} is not a list")
    if len(value) > limit:
        raise _bad(f"{what} has more than {limit} entries")
    return value


@dataclass(frozen=True)
class Layer:
    """One file system of an image.

    `torrent`: v2 info-hash (64 hex) of the layer's own torrent; `size`: bytes; `file`: the name of
    the single file in that torrent; `cipher`: how it is encrypted (`private`), if it is.
    """

    torrent: str
    size: int
    file: str
    format: str = "squashfs"
    cipher: str = ""

    def __post_init__(self) -> None:
        if not _HASH.fullmatch(_text(self.torrent, "layer hash", 64)):
            raise _bad("a layer's hash is not 64 lower-case hex digits")
        _number(self.size, "layer size", 1, MAX_LAYER_SIZE)
        if not _LAYER_FILE.fullmatch(_text(self.file, "layer file", 255)):
            raise _bad("a layer's file name is not hostos-<16 hex digits>.squashfs")
        if self.format not in FORMATS:
            raise _bad(f"layer format {_text(self.format, 'layer format', 40)!r} is not known")
        if self.cipher not in ("", CIPHER):
            raise _bad(f"layer cipher {_text(self.cipher, 'layer cipher', 40)!r} is not known")
        if self.cipher and self.size % SECTOR:
            raise _bad("an encrypted layer has no whole number of sectors")


@dataclass(frozen=True)
class BootConfig:
    """What an image asks to be run, all of it optional.

    `command`: argv (empty: the image's init); `env`: pairs, sorted by key; `user`: `NAME|UID[:GROUP|GID]`
    (empty: root); `workdir`: absolute; `ports`: what it listens on, as `80/tcp`. Raises UserError.
    """

    command: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    user: str = ""
    workdir: str = ""
    ports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for word in self.command:
            _text(word, "command", 128 * 1024)  # MAX_ARG_STRLEN of execve(2)
        if self.command and not self.command[0]:
            raise _bad("the command's first word is empty")
        for key, value in self.env:
            if not _ENV_KEY.fullmatch(_text(key, "environment variable", 256)):
                raise _bad(f"{key[:40]!r} is not a name for an environment variable")
            _text(value, f"environment variable {key}", 128 * 1024)
        if len({key for key, _ in self.env}) != len(self.env):
            raise _bad("an environment variable is set twice")
        object.__setattr__(self, "env", tuple(sorted(self.env)))
        if not _USER.fullmatch(_text(self.user, "user", 80)):
            raise _bad(f"{self.user!r} is not a user")
        workdir = _text(self.workdir, "working directory", 4095)
        if workdir and (not workdir.startswith("/") or ".." in workdir.split("/") or not workdir.isprintable()):
            raise _bad(f"{workdir[:80]!r} is not an absolute path")
        for port in self.ports:
            match = _PORT.fullmatch(_text(port, "port", 16))
            if not match or int(match[1]) > 65535:
                raise _bad(f"{port!r} is not a port such as 80/tcp")
        if len(set(self.ports)) != len(self.ports):
            raise _bad("a port is listed twice")


@dataclass(frozen=True)
class Manifest:
    """An image: `layers` lowest first. Construction checks everything and raises UserError.

    `parents`: hashes of the images it inherits from, nearest first, whose layers are its own lower
    ones; `history`: for each layer what made it, in a few words, or nothing at all. Both only inform.
    """

    name: str
    architecture: str
    layers: tuple[Layer, ...]
    boot: BootConfig = BootConfig()
    parents: tuple[str, ...] = ()
    history: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(_text(self.name, "name", 128))
        if not _ARCHITECTURE.fullmatch(_text(self.architecture, "architecture", 32)):
            raise _bad(f"{self.architecture!r} is not an architecture")
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise _bad(f"{len(self.layers)} layers; an image has 1 to {MAX_LAYERS}")
        if len({layer.torrent for layer in self.layers}) != len(self.layers):
            raise _bad("a layer is listed twice")
        if not all(_HASH.fullmatch(_text(parent, "parent", 64)) for parent in self.parents):
            raise _bad("a parent is not 64 lower-case hex digits")
        if len(set(self.parents)) != len(self.parents):
            raise _bad("a parent is listed twice")
        for text in self.history:
            _text(text, "history", MAX_HISTORY)
        if len(self.history) not in (0, len(self.layers)):
            raise _bad("its history is not that of its layers")

    @property
    def size(self) -> int:
        """Bytes of all layers together."""
        return sum(layer.size for layer in self.layers)

    def to_json(self) -> bytes:
        """The one spelling of this manifest: keys sorted, no spaces, UTF-8, one final newline.

        Raises UserError when that is larger than `MAX_MANIFEST`.
        """
        boot = {
            "command": list(self.boot.command),
            "env": dict(self.boot.env),
            "ports": list(self.boot.ports),
            "user": self.boot.user,
            "workdir": self.boot.workdir,
        }
        data = {
            "schema": SCHEMA,
            "kind": KIND,
            "name": self.name,
            "architecture": self.architecture,
            "layers": [
                {key: value for key, value in vars(layer).items() if value or key != "cipher"} for layer in self.layers
            ],
            "boot": {key: value for key, value in boot.items() if value},
        }
        data |= {key: list(value) for key in ("parents", "history") if (value := getattr(self, key))}
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        if len(text) > MAX_MANIFEST:
            raise UserError(
                f"the image's command and environment need {len(text)} bytes of at most {MAX_MANIFEST}",
                "put long values into a file of the image",
            )
        return text

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """The manifest in `data` (JSON). Raises UserError on anything malformed."""
        if len(data) > MAX_MANIFEST:
            raise _bad(f"{len(data)} bytes, more than {MAX_MANIFEST}")
        try:
            value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise _bad("not JSON") from None
        if isinstance(value, dict) and value.get("schema", SCHEMA) != SCHEMA:
            raise UserError(
                f"the image's manifest has schema {str(value['schema'])[:20]}, this hostos knows {SCHEMA}",
                "update hostos" if type(value["schema"]) is int and value["schema"] > SCHEMA else "",
            )
        required = ("schema", "kind", "name", "architecture", "layers", "boot")
        value = _object(value, "the manifest", required, ("parents", "history"))
        _number(value["schema"], "schema", SCHEMA, SCHEMA)
        if value["kind"] != KIND:
            raise _bad(f"its kind is not {KIND}")
        return cls(
            name=_text(value["name"], "name", 128),
            architecture=_text(value["architecture"], "architecture", 32),
            layers=tuple(_layer(item) for item in _list(value["layers"], "layers", MAX_LAYERS)),
            boot=_boot(value["boot"]),
            parents=tuple(_list(value.get("parents", []), "parents", MAX_PARENTS)),
            history=tuple(_list(value.get("history", []), "history", MAX_LAYERS)),
        )


def _layer(value: Any) -> Layer:
    fields = _object(value, "a layer", ("torrent", "size", "file", "format"), ("cipher",))
    if "cipher" in fields and fields["cipher"] != CIPHER:
        raise _bad("layer cipher is not known")
    if not isinstance(fields["format"], str):
        raise _bad("layer format is not a string")
    return Layer(**fields)


def _boot(value: Any) -> BootConfig:
    fields = _object(value, "boot", (), ("command", "env", "user", "workdir", "ports"))
    env = fields.get("env", {})
    if not isinstance(env, dict) or len(env) > 4096:
        raise _bad("env is not an object of at most 4096 variables")
    return BootConfig(
        command=tuple(_list(fields.get("command", []), "command", 4096)),
        env=tuple(env.items()),
        user=fields.get("user", ""),
        workdir=fields.get("workdir", ""),
        ports=tuple(_text(port, "port", 16) for port in _list(fields.get("ports", []), "ports", 1024)),
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
