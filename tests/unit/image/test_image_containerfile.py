"""A Containerfile built by buildah in the sandbox, from nothing and from a layout beside it; no registry is asked."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.image import builder, sandbox, verifying
from hostos.image.layers import read_image
from hostos.image.store import Store
from hostos.steps import Steps

pytestmark = [
    pytest.mark.skipif(not shutil.which("buildah"), reason="needs buildah"),
    pytest.mark.skipif(not shutil.which("tar2sqfs"), reason="needs tar2sqfs and sqfs2tar (squashfs-tools-ng)"),
]

RECIPE = """
name = "test/contained"
source-date-epoch = 1700000000
[base]
containerfile = "context/Containerfile"
[[step]]
run = "cat /made > /etc/step"
"""
SCRATCH = """
FROM scratch
COPY tree /
RUN echo hello > /made; id -u > /who; cat /proc/self/uid_map > /map; chown 33:33 /made; chmod 4755 /made
RUN rm -rf /usr/share/gone; mkdir /usr/share/gone; echo new > /usr/share/gone/new
ENV A=b
USER 33
WORKDIR /srv
EXPOSE 80
CMD ["cat", "/made"]
"""


@pytest.fixture
def context(workshop: Path) -> Path:
    place = workshop / "context"
    place.mkdir(mode=0o700)  # which nobody of the sandbox may enter
    (workshop / "tree").rename(place / "tree")
    (place / "Containerfile").write_text(SCRATCH)
    (workshop / "r.toml").write_text(RECIPE)
    return place


def test_a_containerfile_is_built(context: Path, workshop: Path) -> None:
    made = builder.build(workshop / "r.toml", "", Steps(), builder.Options()).image
    boot = made.manifest.boot
    assert (boot.command, dict(boot.env)["A"], boot.user, boot.workdir, boot.ports) == (
        ("cat", "/made"), "b", "33", "/srv", ("80/tcp",),
    )  # fmt: skip
    assert len(made.manifest.layers) >= 4
    assert any("echo hello" in text for text in made.manifest.history)
    with ExitStack() as stack:
        tree = read_image(Store(), made, stack, Steps())

        def content(path: bytes) -> bytes:
            node = tree.root.find(path)
            assert node is not None, path
            return node.entry.read(999)

        assert content(b"made") == content(b"etc/step") == b"hello\n"
        assert content(b"who") == b"0\n"
        assert content(b"usr/share/gone/new") == b"new\n"
        assert tree.root.find(b"usr/share/gone/old") is None
        file = tree.root.find(b"made").entry  # type: ignore[union-attr]
        assert (file.uid, file.gid, file.mode & 0o7777, file.mtime) == (33, 33, 0o4755, 1_700_000_000)
        if os.geteuid() == 0:
            # Its commands were root of nobody.
            assert content(b"map").split()[1] == str(sandbox.ROOT_BASE).encode()
    # The same again from buildah's cache, and with nothing of it.
    assert builder.build(workshop / "r.toml", "", Steps(), builder.Options()).image.hash == made.hash
    assert verifying.verify(workshop / "r.toml", "", Steps()) == made.hash
    assert {path.name for path in sandbox.scratch().iterdir()} == {"buildah", "t"}


def test_from_a_layout_beside_it(context: Path, workshop: Path) -> None:
    base = workshop / "base.toml"
    base.write_text(RECIPE.partition("[[step]]")[0])
    below = builder.build(base, "", Steps(), builder.Options()).image
    assert below.manifest.layers
    # buildah's own, as `skopeo copy … oci:` would write it.
    from hostos.image import containerfile

    with ExitStack() as stack:
        layout = containerfile.build(
            context / "Containerfile", 1_700_000_000, sandbox.ids(), workshop / "log", stack, Steps()
        )
        shutil.copytree(layout, context / "base")
    (context / "Containerfile").write_text("FROM oci:base:latest\nUSER 0\nRUN cat /who > /again\n")
    made = builder.build(workshop / "r.toml", "", Steps(), builder.Options()).image
    assert made.manifest.layers[: len(below.manifest.layers)] == below.manifest.layers
    with ExitStack() as stack:
        node = read_image(Store(), made, stack, Steps()).root.find(b"again")
        assert node
        assert node.entry.read(9) == b"0\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("FROM scratch\nCOPY nothing /\n", "no items matching|no such file"),
        ("FROM scratch\nCOPY tree /\nRUN echo alas; exit 3\n", r"(.*\n)*.*alas"),
        ("FROM scratch\nCOPY ../r.toml /\n", "failed with status"),
        ("NONSENSE\n", "failed with status"),
        ("FROM oci:nowhere\n", "nowhere"),
    ],
)
def test_failing_ones_publish_nothing(context: Path, workshop: Path, text: str, why: str) -> None:
    (context / "Containerfile").write_text(text)
    with pytest.raises(UserError, match=why) as told:
        builder.build(workshop / "r.toml", "", Steps(), builder.Options())
    assert told.value.status == 1
    assert "all it said: " in told.value.hint
    assert Store().images() == []
    assert {path.name for path in sandbox.scratch().iterdir()} <= {"buildah", "t"}


def test_other_bad_input(context: Path, workshop: Path) -> None:
    (workshop / "r.toml").write_text(RECIPE.replace('name = "test', 'architecture = "riscv64"\nname = "test'))
    with pytest.raises(UserError, match=r"is for riscv64, its base .*Containerfile for x86_64|aarch64"):
        builder.build(workshop / "r.toml", "", Steps(), builder.Options())
    (context / "Containerfile").unlink()
    with pytest.raises(UserError, match="there is no .*Containerfile") as told:
        builder.build(workshop / "r.toml", "", Steps(), builder.Options())
    assert told.value.status == 2
    assert Store().images() == []
