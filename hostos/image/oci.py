"""Reads OCI image layouts and archives, and what `docker save` and `podman save` write.

https://github.com/opencontainers/image-spec: layout, index, manifest, config and layer. Nothing is ever
extracted; every blob is checked against its digest before anything of it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

from hostos.errors import UserError
from hostos.image import overlay
from hostos.image.entries import Entry, printable
from hostos.image.overlay import Tree
from hostos.image.sources import read_tar
from hostos.live.manifest import MAX_LAYERS, BootConfig
from hostos.steps import Steps

MAX_JSON = 4 << 20
"""Largest index, manifest or configuration, bytes (registries allow 4 MiB)."""
MOST_LAYERS = 1024
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_MACHINES = {
    "amd64": "x86_64", "arm64": "aarch64", "386": "i686", "arm": "armv7l", "riscv64": "riscv64",
    "ppc64le": "ppc64le", "s390x": "s390x", "loong64": "loongarch64",
}  # fmt: skip
_PREFIX, _OPAQUE = b".wh.", b".wh..wh..opq"


@dataclass
class OciImage:
    """`boot`: what its configuration asks to run; `blobs`: its layers, lowest first, with what made each."""

    source: Path
    architecture: str
    boot: BootConfig
    blobs: list[tuple[Path, str]]
    steps: Steps
    warned: set[str] = field(default_factory=set)

    def layers(self, stack: ExitStack) -> Iterator[tuple[str, list[Entry]]]:
        """What made each layer, and its entries, arranged; empty ones are left out.

        More than an image can have become one at the bottom. Raises UserError for hostile archives.
        """
        below = overlay.merge([])
        surplus = len(self.blobs) - MAX_LAYERS
        if surplus > 0:
            self.steps.note(f"{len(self.blobs)} layers: the lowest {surplus + 1} become one")
        for number, (blob, text) in enumerate(self.blobs):
            entries = translate(read_tar(blob, stack, self.steps), below, f"{self.source}: layer {number}")
            below = overlay.on_top(below, entries, number)
            if surplus > 0 and number == surplus:
                yield f"{surplus + 1} layers of {self.source.name}", below.entries()
            elif number > surplus and len(entries) > 1:
                yield text, entries


def read(source: Path, tag: str, stack: ExitStack, steps: Steps) -> OciImage:
    """The image in a layout directory or an archive; `tag`: which, if there are several. Raises UserError."""
    store = _Directory(source) if source.is_dir() else _Archive(source, stack)
    if store.has("index.json"):
        manifest = _from_index(store, store.json("index.json"), source, tag)
    elif store.has("manifest.json"):
        manifest = _from_docker(store, source, tag)
    else:
        raise UserError(
            f"{source} holds neither index.json nor manifest.json: no OCI layout",
            "make one: skopeo copy docker://IMAGE oci:DIR:TAG, or podman save --format oci-archive",
        )
    config = manifest.config
    machine = _MACHINES.get(str(config.get("architecture", "")))
    if config.get("os", "linux") != "linux" or machine is None:
        raise UserError(
            f"{source}: it is for {config.get('os')}/{config.get('architecture')}, which no hostos machine runs",
            f"take one for linux and one of {', '.join(sorted(_MACHINES))}",
        )
    made = [str(each.get("created_by", "")) for each in _history(config) if not each.get("empty_layer")]
    made += [""] * (len(manifest.layers) - len(made))
    blobs = [(store.blob(digest, stack), text) for digest, text in zip(manifest.layers, made, strict=False)]
    return OciImage(source, machine, boot_of(config, steps), blobs, steps)


def translate(entries: list[Entry], below: Tree, what: str) -> list[Entry]:
    """OCI's whiteouts as overlayfs's, missing directories and targets of hard links as in `below`; arranged."""
    kept: list[Entry] = []
    hidden: list[Entry] = []
    opaque: set[bytes] = set()
    for entry in entries:
        parent, _, name = entry.path.rpartition(b"/")
        if name == _OPAQUE:
            opaque.add(parent)
        elif name.startswith(_PREFIX):
            target = name[len(_PREFIX) :]
            if not target or target in (b".", b".."):
                raise UserError(f"{what}: {printable(entry.path)} removes nothing that could be there")
            if not target.startswith(_PREFIX):  # aufs kept its own records under such names
                hidden.append(overlay.whiteout(parent + b"/" + target if parent else target))
        elif overlay.is_whiteout(entry):
            raise UserError(f"{what}: {printable(entry.path)} is a device 0:0, which would hide what is below it")
        else:
            kept.append(replace(entry, xattrs=tuple(x for x in entry.xattrs if not x[0].startswith(overlay.PREFIX))))
    named = {entry.path for entry in kept}
    linked = []
    for entry in kept:
        if entry.link is not None and entry.link not in named and (node := below.root.find(entry.link)):
            named.add(entry.link)
            linked.append(replace(node.entry, path=entry.link))
    # What a layer adds and hides at once is there: whiteouts are about the layers below.
    whiteouts = [entry for entry in hidden if entry.path not in named]
    found = overlay.complete([*linked, *kept, *whiteouts], below, what)
    missing = opaque - {entry.path for entry in found}
    if missing:
        extra = [Entry(path, 0o040755) for path in sorted(missing)]
        found = overlay.complete([*extra, *found], below, what)
    return [overlay.opaque(entry) if entry.path in opaque else entry for entry in found]


def boot_of(config: dict[str, Any], steps: Steps) -> BootConfig:
    """The boot configuration an OCI configuration means. What hostos doesn't take is warned about."""
    inner = config.get("config") or {}
    if not isinstance(inner, dict):
        raise UserError("the image's configuration is damaged: `config` is not an object")
    command = [*_words(inner, "Entrypoint"), *_words(inner, "Cmd")]
    env = {}
    for item in _words(inner, "Env"):
        name, _, value = item.partition("=")
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,255}", name):
            env[name] = value
        else:
            steps.warning(f"environment variable {name[:40]!r} left out: not a name")
    ports = []
    for port in inner.get("ExposedPorts") or {}:
        full = port if "/" in port else f"{port}/tcp"
        if re.fullmatch(r"[1-9][0-9]{0,4}/(tcp|udp)", full):
            ports.append(full)
        else:
            steps.warning(f"port {port[:40]!r} left out")
    workdir = str(inner.get("WorkingDir") or "")
    if inner.get("Volumes"):
        steps.warning("its volumes are ordinary directories here: bind something over them (--bind)")
    try:
        return BootConfig(
            tuple(command), tuple(env.items()), str(inner.get("User") or ""), workdir, tuple(sorted(ports))
        )
    except UserError as error:
        raise UserError(f"its configuration: {error.message.replace('image manifest: ', '')}") from None


# --- where blobs are --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Manifest:
    config: dict[str, Any]
    layers: list[str]
    """Digests, or names of members of a docker archive."""


class _Directory:
    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def content(self, name: str) -> bytes:
        path = self.root / name
        try:
            if path.stat().st_size > MAX_JSON:
                raise UserError(f"{path}: more than {MAX_JSON} bytes: refused")
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}", "is the layout complete?") from None

    def json(self, name: str, digest: str = "") -> dict[str, Any]:
        return _json(self.content(name), name, digest)

    def blob(self, digest: str, stack: ExitStack) -> Path:
        path = self.root / _blob_name(digest)
        try:
            with path.open("rb") as file:
                _check(file, digest, str(path))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}", "is the layout complete?") from None
        return path


class _Archive:
    """Members are found by name and copied out under a name of ours: their own names lead nowhere."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        try:
            self.tar = stack.enter_context(tarfile.open(path, "r:*"))  # noqa: SIM115
            self.members = {each.name.removeprefix("./"): each for each in self.tar.getmembers()}
        except FileNotFoundError:
            raise UserError(f"{path} does not exist", "give an OCI archive or layout") from None
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{path}: not a usable archive: {error}") from None
        self.place = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    def has(self, name: str) -> bool:
        return name in self.members

    def content(self, name: str) -> bytes:
        member = self._open(name)
        if self.members[name].size > MAX_JSON:
            raise UserError(f"{self.path}: {name} has more than {MAX_JSON} bytes: refused")
        return member.read()

    def json(self, name: str, digest: str = "") -> dict[str, Any]:
        return _json(self.content(name), f"{self.path}: {name}", digest)

    def blob(self, digest: str, stack: ExitStack) -> Path:
        name = digest if digest in self.members else _blob_name(digest)
        target = self.place / hashlib.sha256(digest.encode()).hexdigest()
        source = self._open(name)
        with target.open("wb") as file:
            shutil.copyfileobj(source, cast("IO[bytes]", file), 1 << 20)
        if _DIGEST.fullmatch(digest):
            with target.open("rb") as file:
                _check(file, digest, f"{self.path}: {name}")
        return target

    def _open(self, name: str) -> IO[bytes]:
        member = self.members.get(name)
        # docker save writes a layer that occurs twice as a link to the first.
        if member is not None and member.issym():
            member = self.members.get(str(Path(name).parent.joinpath(member.linkname)).replace("/../", "/"))
        if member is None or not member.isfile():
            raise UserError(f"{self.path}: it lacks {name}", "is the archive complete?")
        return cast("IO[bytes]", self.tar.extractfile(member))


_Source = _Directory | _Archive


def _blob_name(digest: str) -> str:
    match = _DIGEST.fullmatch(digest)
    if not match:
        raise UserError(f"{digest[:80]!r} is not a digest (sha256:…)", "the layout is damaged")
    return f"blobs/sha256/{match[1]}"


def _check(file: IO[bytes], digest: str, what: str) -> None:
    found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if found != digest.partition(":")[2]:
        raise UserError(f"{what}: its content has the digest {found[:16]}… instead of {digest[7:23]}…", "get it again")


def _json(data: bytes, what: str, digest: str) -> dict[str, Any]:
    if digest and hashlib.sha256(data).hexdigest() != digest.partition(":")[2]:
        raise UserError(f"{what}: its content does not have its digest", "get it again")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{what} is not JSON") from None
    if not isinstance(value, dict | list):
        raise UserError(f"{what} is not an object")
    return cast("dict[str, Any]", value)


def _from_index(store: _Source, index: dict[str, Any], source: Path, tag: str, depth: int = 0) -> _Manifest:
    found = [each for each in _list(index, "manifests", source) if isinstance(each, dict)]
    found = [each for each in found if (each.get("platform") or {}).get("os") != "unknown"]  # attestations
    if tag:
        names = [(each.get("annotations") or {}).get("org.opencontainers.image.ref.name") for each in found]
        found = [each for each, name in zip(found, names, strict=True) if name == tag]
        if not found:
            has = ", ".join(sorted({str(name) for name in names if name})) or "none"
            raise UserError(f"{source} has no image {tag!r}; it has: {has}", "name one of them with --tag")
    if len(found) > 1:
        here = [
            e for e in found if _MACHINES.get((e.get("platform") or {}).get("architecture", "")) == os.uname().machine
        ]
        found = here or found
    if len(found) != 1:
        known = [str((each.get("annotations") or {}).get("org.opencontainers.image.ref.name")) for each in found]
        raise UserError(f"{source} holds {len(found)} images: {', '.join(known)}", "say which: --tag NAME")
    digest = str(found[0].get("digest"))
    value = store.json(_blob_name(digest), digest)
    if "manifests" in value:
        if depth > 3:
            raise UserError(f"{source}: its indexes never end")
        return _from_index(store, value, source, "", depth + 1)
    layers = _list(value, "layers", source)
    digests = []
    for layer in layers:
        kind = str(layer.get("mediaType", "")) if isinstance(layer, dict) else ""
        if "encrypted" in kind or "tar" not in kind:
            raise UserError(f"{source}: a layer of type {kind[:80]!r}, which can't be read", "only tar layers can be")
        digests.append(str(layer.get("digest")))
    config = str((value.get("config") or {}).get("digest"))
    return _Manifest(store.json(_blob_name(config), config), digests)


def _from_docker(store: _Source, source: Path, tag: str) -> _Manifest:
    listed: Any = store.json("manifest.json")
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise UserError(f"{source}: manifest.json is not a list of images")
    found = [each for each in listed if not tag or tag in (each.get("RepoTags") or ())]
    if len(found) != 1:
        names = [name for each in listed for name in each.get("RepoTags") or ()]
        raise UserError(f"{source} holds {len(listed)} images: {', '.join(names)}", "say which: --tag NAME:TAG")
    layers = _list(found[0], "Layers", source)
    return _Manifest(store.json(str(found[0].get("Config"))), [str(each) for each in layers])


def _list(value: Any, name: str, source: Path) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, list) or len(found) > MOST_LAYERS:
        raise UserError(f"{source}: {name} is not a list of at most {MOST_LAYERS}", "the layout is damaged")
    return found


def _history(config: dict[str, Any]) -> list[dict[str, Any]]:
    found = config.get("history") or []
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _words(config: dict[str, Any], name: str) -> list[str]:
    found = config.get(name) or []
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise UserError(f"the image's configuration is damaged: {name} is not a list of words")
    return found
