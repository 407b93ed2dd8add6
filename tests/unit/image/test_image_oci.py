"""OCI images: every layer a layer, whiteouts and configuration kept, hostile ones refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hostos.errors import UserError
from hostos.image import sources
from hostos.image.importing import import_oci
from hostos.image.layers import read_image
from hostos.image.store import Store, StoredImage
from hostos.live.acl import ACCESS, DEFAULT, USER, decode
from hostos.steps import Steps

from_here = pytest.mark.skipif(not shutil.which("tar2sqfs"), reason="needs tar2sqfs and sqfs2tar (squashfs-tools-ng)")
pytestmark = from_here

ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 3, 62, 1) + bytes(40)
Member = tuple[str, bytes | None, dict[str, Any]]


def layer(*members: Member | str) -> bytes:
    """A tar: names of directories, or (name, content or None, TarInfo attributes)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            name, data, attributes = (member, None, {"type": tarfile.DIRTYPE}) if isinstance(member, str) else member
            info = tarfile.TarInfo(name)
            info.mode = 0o755
            info.size = len(data or b"")
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data or b""))
    return out.getvalue()


def file(name: str, data: bytes = b"x", **attributes: Any) -> Member:
    return name, data, attributes


LAYERS = (
    layer("bin", file("bin/prog", ELF), "etc", file("etc/a", b"a"), file("etc/b", b"b"), "d", file("d/1"), file("d/2")),
    layer(file("etc/.wh.a", b""), file("d/.wh..wh..opq", b""), file("d/3"), file("etc/new", b"new", uid=7)),
    layer(file("etc/hard", b"", type=tarfile.LNKTYPE, linkname="etc/b"), file("top", b"top")),
)
CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "config": {
        "Entrypoint": ["/bin/prog"],
        "Cmd": ["--serve"],
        "Env": ["PATH=/bin", "odd name=1", "A=b=c"],
        "User": "33:33",
        "WorkingDir": "/etc",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}, "9/sctp": {}},
    },
    "history": [{"created_by": "ADD base"}, {"created_by": "ENV", "empty_layer": True}, {"created_by": "RUN rm"}],
}


class Layout:
    """An OCI layout in the making."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs/sha256").mkdir(parents=True)
        (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.images: list[dict[str, Any]] = []

    def blob(self, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.root / "blobs/sha256" / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    def image(self, layers: tuple[bytes, ...], config: dict[str, Any], tag: str = "latest", **more: Any) -> Layout:
        kind = "application/vnd.oci.image.layer.v1.tar+gzip"
        blobs = [{"mediaType": kind, **self.blob(gzip.compress(each, mtime=0))} for each in layers]
        described = {"mediaType": "application/vnd.oci.image.config.v1+json", **self.blob(json.dumps(config).encode())}
        manifest = {"schemaVersion": 2, "config": described, "layers": blobs}
        named = {"annotations": {"org.opencontainers.image.ref.name": tag}}
        of_manifest = {"mediaType": "application/vnd.oci.image.manifest.v1+json"}
        self.images.append({**of_manifest, **self.blob(json.dumps(manifest).encode()), **named, **more})
        (self.root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.images}))
        return self


def names(image: StoredImage) -> list[str]:
    with ExitStack() as stack:
        return [entry.path.decode() for entry in read_image(Store(), image, stack, Steps()).entries()]


def take(source: Path, tag: str = "") -> StoredImage:
    return import_oci(source, "test/oci", tag, Steps())[0]


def test_every_layer_becomes_a_layer(home: Path, tmp_path: Path) -> None:
    image = take(Layout(tmp_path / "oci").image(LAYERS, CONFIG).root)
    assert len(image.manifest.layers) == 3
    assert image.manifest.history == ("ADD base", "RUN rm", "")
    assert image.manifest.architecture == "x86_64"
    boot = image.manifest.boot
    assert boot.command == ("/bin/prog", "--serve")
    assert boot.env == (("A", "b=c"), ("PATH", "/bin"))
    assert (boot.user, boot.workdir, boot.ports) == ("33:33", "/etc", ("53/udp", "80/tcp"))
    assert names(image) == ["", "bin", "bin/prog", "d", "d/3", "etc", "etc/b", "etc/hard", "etc/new", "top"]
    with ExitStack() as stack:
        tree = read_image(Store(), image, stack, Steps())
        assert tree.root.find(b"etc/hard").entry.read(9) == b"b"  # type: ignore[union-attr]
        assert tree.root.find(b"etc/new").entry.uid == 7  # type: ignore[union-attr]
    # Another image of the same layers shares them.
    again, new = import_oci(Layout(tmp_path / "2").image(LAYERS[:2], CONFIG).root, "test/other", "", Steps())
    assert new == 0
    assert again.manifest.layers == image.manifest.layers[:2]


def test_archives_are_the_same_image(home: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "oci").image(LAYERS, CONFIG).root
    wanted = take(layout).hash
    archive = tmp_path / "image.tar"
    with tarfile.open(archive, "w") as out:
        out.add(layout, ".")
    assert take(archive).hash == wanted
    # What `docker save` wrote before it wrote layouts.
    with tarfile.open(tmp_path / "docker.tar", "w") as out:
        listed = [{"Config": "c.json", "RepoTags": ["a:b"], "Layers": [f"{n}/layer.tar" for n in range(3)]}]
        members = {"c.json": json.dumps(CONFIG).encode(), "manifest.json": json.dumps(listed).encode()}
        members |= {f"{number}/layer.tar": data for number, data in enumerate(LAYERS)}
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    assert take(tmp_path / "docker.tar", "a:b").hash == wanted


def test_which_of_several(home: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "oci").image(LAYERS[:1], CONFIG, "one").image(LAYERS[:2], CONFIG, "two")
    assert len(take(layout.root, "two").manifest.layers) == 2
    with pytest.raises(UserError, match="holds 2 images: one, two"):
        take(layout.root)
    with pytest.raises(UserError, match="has no image 'three'; it has: one, two"):
        take(layout.root, "three")
    index = json.dumps({"schemaVersion": 2, "manifests": layout.images[:1]}).encode()
    nested = {"schemaVersion": 2, "manifests": [layout.blob(index)]}
    (layout.root / "index.json").write_text(json.dumps(nested))
    assert len(take(layout.root).manifest.layers) == 1


def test_more_layers_than_an_image_can_have(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hostos.image import oci

    monkeypatch.setattr(oci, "MAX_LAYERS", 2)
    image = take(Layout(tmp_path / "oci").image(LAYERS, CONFIG).root)
    assert len(image.manifest.layers) == 2
    assert names(image) == ["", "bin", "bin/prog", "d", "d/3", "etc", "etc/b", "etc/hard", "etc/new", "top"]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (file("/etc/passwd"), "absolute path"),
        (file("../../etc/passwd"), "leaves the tree"),
        (file("a/../../x"), "leaves the tree"),
        (file("l", b"", type=tarfile.LNKTYPE, linkname="../../etc/passwd"), "leaves the tree"),
        (file("l", b"", type=tarfile.LNKTYPE, linkname="nowhere"), "which isn't there"),
        (file("hide", b"", type=tarfile.CHRTYPE, devmajor=0, devminor=0), "device 0:0"),
        (file("dev", b"", type=tarfile.BLKTYPE, devmajor=9999, devminor=0), "out of range"),
        (file("d/.wh."), "removes nothing"),
        (file("d/.wh..."), "removes nothing"),
    ],
)
def test_hostile_layers(home: Path, tmp_path: Path, bad: Member, why: str) -> None:
    with pytest.raises(UserError, match=why):
        take(Layout(tmp_path / "oci").image((LAYERS[0], layer(bad)), CONFIG).root)
    assert Store().images() == []


def test_a_symbolic_link_leads_nothing_out(home: Path, tmp_path: Path) -> None:
    """A link to outside and a file below its name: refused, as no file system could hold both."""
    both = layer(file("esc", b"", type=tarfile.SYMTYPE, linkname=str(tmp_path)), file("esc/written", b"out"))
    with pytest.raises(UserError, match="is not a directory"):
        take(Layout(tmp_path / "oci").image((LAYERS[0], both), CONFIG).root)
    assert not (tmp_path / "written").exists()
    # In two layers the directory of the second replaces the link of the first.
    two = (
        LAYERS[0],
        layer(file("esc", b"", type=tarfile.SYMTYPE, linkname=str(tmp_path))),
        layer(file("esc/in", b"in")),
    )
    image = take(Layout(tmp_path / "oci2").image(two, CONFIG).root)
    assert "esc/in" in names(image)
    assert not (tmp_path / "in").exists()


def test_decompression_bombs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BOMB_SIZE", 1 << 20)
    with pytest.raises(UserError, match="times its size"):
        take(Layout(tmp_path / "oci").image((layer(file("zeros", bytes(4 << 20))),), CONFIG).root)
    assert Store().images() == []


def test_acls_of_layers_are_kept(home: Path, tmp_path: Path) -> None:
    text = "user::rwx\nuser:lisa:r-x:502\ngroup::r-x\nmask::r-x\nother::---"
    first = layer("bin", file("bin/prog", ELF), ("etc", None, {"type": tarfile.DIRTYPE, "pax_headers": {
        "SCHILY.acl.access": text, "SCHILY.acl.default": text,
    }}))  # fmt: skip
    second = layer(file("etc/more"))
    image = take(Layout(tmp_path / "oci").image((first, second), CONFIG).root)
    with ExitStack() as stack:
        tree = read_image(Store(), image, stack, Steps())
        etc = tree.root.find(b"etc")
        assert etc
        found = {name: decode(value) for name, value in etc.entry.xattrs}
        assert found.keys() == {ACCESS, DEFAULT}
        assert (USER, 5, 502) in found[ACCESS]
        assert tree.root.find(b".hostos-acls") is None
        assert tree.root.find(b"etc/more")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda root: (root / "index.json").write_text("{"), "not JSON"),
        (lambda root: (root / "index.json").write_text("{}"), "manifests is not a list"),
        (lambda root: (root / "index.json").unlink(), "no OCI layout"),
        (lambda root: [p.unlink() for p in (root / "blobs/sha256").iterdir()], "is the layout complete"),
        (lambda root: [p.write_bytes(p.read_bytes() + b" ") for p in (root / "blobs/sha256").iterdir()], "digest"),
    ],
)
def test_damaged_layouts(home: Path, tmp_path: Path, damage: Any, why: str) -> None:
    layout = Layout(tmp_path / "oci").image(LAYERS[:1], CONFIG)
    damage(layout.root)
    with pytest.raises(UserError) as told:
        take(layout.root)
    assert why in str(told.value)


def test_digests_that_are_paths(home: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "oci")
    (tmp_path / "secret").write_text("{}")
    evil = {"schemaVersion": 2, "manifests": [{"digest": "sha256:../../../secret"}]}
    (layout.root / "index.json").write_text(json.dumps(evil))
    with pytest.raises(UserError, match="is not a digest"):
        take(layout.root)


def test_other_machines(home: Path, tmp_path: Path) -> None:
    image = take(Layout(tmp_path / "arm").image((layer(file("x")),), {**CONFIG, "architecture": "arm64"}).root)
    assert image.manifest.architecture == "aarch64"
    with pytest.raises(UserError, match="windows/amd64"):
        take(Layout(tmp_path / "win").image(LAYERS[:1], {**CONFIG, "os": "windows"}).root)


@pytest.mark.skipif(not shutil.which("skopeo"), reason="needs skopeo")
def test_what_skopeo_writes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same image, whichever way skopeo stores it; docker archives lose who made which layer."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    layout = Layout(tmp_path / "oci").image(LAYERS, complete(LAYERS)).root
    wanted = take(layout)
    for target in ("oci:copied:x", "oci-archive:a.tar:x", "docker-archive:d.tar:t/x:y"):
        subprocess.run(
            ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{layout}:latest", target], cwd=tmp_path, check=True
        )
        kind, name, _ = target.split(":", 2)
        assert take(tmp_path / name).manifest.layers == wanted.manifest.layers, kind


@pytest.mark.skipif(not shutil.which("umoci"), reason="needs umoci")
@pytest.mark.skipif(os.geteuid() != 0, reason="unpacks as root")
def test_what_umoci_writes(home: Path, tmp_path: Path) -> None:
    """A layer that umoci makes of what was changed in an unpacked image, with whiteouts of its own."""
    layout = Layout(tmp_path / "oci").image(LAYERS, complete(LAYERS)).root
    bundle = tmp_path / "bundle"

    def umoci(*words: str | Path) -> None:
        subprocess.run(["umoci", *words], check=True, capture_output=True)

    umoci("unpack", "--image", f"{layout}:latest", bundle)
    (bundle / "rootfs/etc/b").unlink()
    (bundle / "rootfs/added").write_text("added")
    umoci("repack", "--image", f"{layout}:changed", bundle)
    image = take(layout, "changed")
    assert len(image.manifest.layers) == 4
    paths = names(image)
    assert "etc/b" not in paths
    assert {"added", "etc/hard", "top"} <= set(paths)


def complete(layers: tuple[bytes, ...]) -> dict[str, Any]:
    """A configuration strict programs take, too."""
    history = [{"created_by": f"step {number}"} for number in range(len(layers))]
    digests = [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in layers]
    inner = {"Cmd": ["/bin/prog"], "Env": ["PATH=/bin"]}
    rootfs = {"type": "layers", "diff_ids": digests}
    return {"architecture": "amd64", "os": "linux", "config": inner, "history": history, "rootfs": rootfs}
