"""An Arch base is built by pacman from a repository; here one of our own with one package."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.image import builder, sandbox
from hostos.image.importing import bill
from hostos.image.layers import read_image
from hostos.image.store import Store
from hostos.steps import Steps

BUSYBOX = Path("/bin/busybox")
TOOLS = ("pacman", "repo-add", "tar2sqfs")
pytestmark = [
    pytest.mark.skipif(
        not all(map(shutil.which, TOOLS)),
        reason="needs pacman and repo-add (pacman-package-manager) and tar2sqfs",
    ),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="needs busybox-static"),
]

INFO = """pkgname = tiny
pkgbase = tiny
pkgver = 1.2-3
pkgdesc = A shell
url = http://localhost
builddate = 1700000000
packager = test
size = 1000
arch = any
license = none
"""


def package(path: Path) -> None:
    """A package as makepkg writes it, without .MTREE (pacman takes its list of files for true)."""
    with tarfile.open(path, "w:gz") as archive:

        def add(name: str, data: bytes = b"", **attributes: object) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), 1_700_000_000, 0o755
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))

        add(".PKGINFO", INFO.encode(), mode=0o644)
        add("usr", type=tarfile.DIRTYPE)
        add("usr/bin", type=tarfile.DIRTYPE)
        add("usr/bin/busybox", BUSYBOX.read_bytes())
        add("usr/bin/sh", type=tarfile.SYMTYPE, linkname="busybox")
        add("bin", type=tarfile.SYMTYPE, linkname="usr/bin")


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory everybody may enter, with a repository."""
    try:
        sandbox.inside_works()
    except UserError as error:
        pytest.skip(str(error))
    path = Path(tempfile.mkdtemp(prefix="hostos-arch-", dir="/var/tmp"))
    path.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(path))
    repository = path / "repo"
    repository.mkdir()
    package(repository / "tiny-1.2-3-any.pkg.tar.gz")
    subprocess.run(
        ["repo-add", "-q", repository / "own.db.tar.gz", repository / "tiny-1.2-3-any.pkg.tar.gz"],
        check=True,
        capture_output=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    yield path
    subprocess.run(["rm", "-rf", path], check=False)


def test_an_arch_base_from_a_repository_of_ones_own(place: Path) -> None:
    recipe = place / "arch.toml"
    recipe.write_text(
        f'name = "os/arch"\nsource-date-epoch = 1700000000\n[base]\narch = true\npackages = ["tiny"]\n'
        f'mirror = "file://{place}/repo"\ncomponents = ["own"]\nvariant = "unsigned"\n'
        '[[step]]\nrun = "echo built > /etc/built"\n'
    )
    image = builder.build(recipe, "", Steps(), builder.Options()).image
    assert len(image.manifest.layers) == 2
    with ExitStack() as stack:
        tree = read_image(Store(), image, stack, Steps())
        paths = {entry.path for entry in tree.entries()}
        assert {b"usr/bin/busybox", b"etc/built", b"bin"} <= paths
        assert not any(path.startswith((b"var/lib/pacman/sync/", b"var/cache/pacman/pkg/")) for path in paths)
        busybox = tree.root.find(b"usr/bin/busybox").entry  # type: ignore[union-attr]
        assert (busybox.uid, busybox.mode & 0o777) == (0, 0o755)
    assert b'"purl":"pkg:alpm/arch/tiny@1.2-3?arch=any"' in bill(image.hash, Steps())
    # What the mirror does not have fails with what pacman says.
    recipe.write_text(recipe.read_text().replace('["tiny"]', '["huge"]'))
    with pytest.raises(UserError, match="target not found: huge"):
        builder.build(recipe, "", Steps(), builder.Options(update=True))
