"""The bill of materials of an image: the packages its tree says are installed, as CycloneDX 1.5 JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from hostos.image.buildcache import Package
from hostos.image.overlay import Tree
from hostos.live.manifest import Manifest
from hostos.live.torrents import MAX_BILL

_MAX_DATABASE = 64 << 20


@dataclass(frozen=True)
class Installed:
    """`kind` and `namespace`: as package URLs have them (https://github.com/package-url/purl-spec)."""

    kind: str
    namespace: str
    name: str
    version: str
    architecture: str = ""


def bill_of(tree: Tree, manifest: Manifest, archives: Mapping[str, Package]) -> bytes:
    """CycloneDX without serial number and time stamp: same tree, same bytes. `archives`: hashes that are known.

    What would make it larger than an image may carry is left out: hashes first, then the list is cut and says so.
    """
    found = sorted(set(installed(tree)), key=lambda each: (each.name, each.version, each.architecture))
    for hashes in (True, False):
        text = _document(manifest, found, archives if hashes else {})
        if len(text) <= MAX_BILL:
            return text
    while len(text) > MAX_BILL:
        found = found[: len(found) * 9 // 10]
        text = _document(manifest, found, {}, complete=False)
    return text


def _document(
    manifest: Manifest, found: list[Installed], archives: Mapping[str, Package], *, complete: bool = True
) -> bytes:
    component = {"type": "container", "name": manifest.name}
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": component},
        "components": [_component(each, archives) for each in found],
        "compositions": [{"aggregate": "complete" if complete else "incomplete"}],
    }
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def _component(each: Installed, archives: Mapping[str, Package]) -> dict[str, object]:
    arch = f"?arch={quote(each.architecture)}" if each.architecture else ""
    purl = f"pkg:{each.kind}/{each.namespace}/{quote(each.name)}@{quote(each.version, safe='')}{arch}"
    entry: dict[str, object] = {"type": "library", "name": each.name, "version": each.version, "purl": purl}
    archive = archives.get(each.name)
    if archive and archive.sha256 and archive.version == each.version:
        entry["hashes"] = [{"alg": "SHA-256", "content": archive.sha256}]
    return entry


def installed(tree: Tree) -> Iterator[Installed]:
    """What the databases of dpkg, pacman and apk say."""
    release = dict(
        line.replace('"', "").partition("=")[::2]
        for path in (b"etc/os-release", b"usr/lib/os-release")
        for line in _text(tree, path).splitlines()
    )
    family = release.get("ID", "")
    texts = [_text(tree, b"var/lib/dpkg/status"), *_texts(tree, b"var/lib/dpkg/status.d")]
    for record in "\n\n".join(texts).split("\n\n"):
        fields = _fields(record)
        if "Package" in fields and fields.get("Status", "install ok installed").endswith(" installed"):
            version, arch = fields.get("Version", ""), fields.get("Architecture", "")
            yield Installed("deb", family or "debian", fields["Package"], version, arch)
    node = tree.root.find(b"var/lib/pacman/local")
    for name in node.children if node else ():
        rows = re.findall(r"%(\w+)%\n([^\n]*)", _text(tree, b"var/lib/pacman/local/" + name + b"/desc"))
        fields = dict(rows)
        if "NAME" in fields:
            yield Installed("alpm", family or "arch", fields["NAME"], fields.get("VERSION", ""), fields.get("ARCH", ""))
    for record in _text(tree, b"lib/apk/db/installed").split("\n\n"):
        fields = dict(line.partition(":")[::2] for line in record.splitlines())
        if "P" in fields:
            yield Installed("apk", family or "alpine", fields["P"], fields.get("V", ""), fields.get("A", ""))


def _fields(record: str) -> dict[str, str]:
    return dict(line.partition(": ")[::2] for line in record.splitlines() if line[:1].isalpha())


def _texts(tree: Tree, path: bytes) -> list[str]:
    node = tree.root.find(path)
    return [_text(tree, path + b"/" + name) for name in sorted(node.children)] if node else []


def _text(tree: Tree, path: bytes) -> str:
    node = tree.root.find(path)
    return node.entry.read(_MAX_DATABASE).decode(errors="replace") if node and node.entry.open else ""
