"""An Arch base is built by pacman from a repository; here one of our own with one package."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mirror.server import Web
from sandboxes import scratch

from hostos.errors import UserError
from hostos.image import builder, recipe_lock, verifying
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

INFO = """pkgname = {name}
pkgbase = {name}
pkgver = {version}
pkgdesc = A shell
url = http://localhost
builddate = 1700000000
packager = test
size = 1000
arch = any
license = none
"""
SHELL: dict[str, bytes | str] = {"usr/bin/busybox": BUSYBOX.read_bytes() if BUSYBOX.exists() else b"",
                                 "usr/bin/sh": "busybox", "usr/bin/rm": "busybox", "bin": "usr/bin"}  # fmt: skip


def package(repository: Path, name: str, version: str, files: dict[str, bytes | str]) -> None:
    """A package as makepkg writes it, without .MTREE (pacman takes its list of files for true), in the repository.

    `files`: contents, or where links lead.
    """
    path = repository / f"{name}-{version}-any.pkg.tar.gz"
    with tarfile.open(path, "w:gz") as archive:

        def add(name: str, data: bytes = b"", **attributes: object) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), 1_700_000_000, 0o755
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))

        add(".PKGINFO", INFO.format(name=name, version=version).encode(), mode=0o644)
        for directory in sorted({str(parent) for file in files for parent in Path(file).parents} - {"."}):
            add(directory, type=tarfile.DIRTYPE)
        for file, content in files.items():
            if isinstance(content, str):
                add(file, type=tarfile.SYMTYPE, linkname=content)
            else:
                add(file, content)
    subprocess.run(
        ["repo-add", "-q", repository / "own.db.tar.gz", path],
        check=True, capture_output=True, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip


def pacman_itself() -> dict[str, bytes | str]:
    """This host's pacman, and the libraries that it needs."""
    program = shutil.which("pacman")
    assert program
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    files: dict[str, bytes | str] = {
        "usr/bin/pacman": Path(program).read_bytes(),
        "lib64": "usr/lib64",
        "lib": "usr/lib",
    }
    for library in (word for word in listed.split() if word.startswith("/")):
        files["usr" + library.removeprefix("/usr")] = Path(library).resolve().read_bytes()
    return files


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory everybody may enter, with a repository."""
    with scratch(monkeypatch) as path:
        repository = path / "repo"
        repository.mkdir()
        package(repository, "tiny", "1.2-3", SHELL)
        yield path


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


def test_a_step_installs_with_the_images_own_pacman(place: Path) -> None:
    config = b"[options]\nArchitecture = auto\nSigLevel = Never\n[own]\nServer = http://%s\n"
    web = Web(place / "repo")
    try:
        package(place / "repo", "pacman", "6-1", pacman_itself() | {"etc/pacman.conf": config % web.address.encode()})
        package(place / "repo", "more", "1-1", {"usr/share/more": b"installed"})
        recipe = place / "arch.toml"
        recipe.write_text(
            f'name = "os/arch"\nsource-date-epoch = 1700000000\n[base]\narch = true\npackages = ["tiny", "pacman"]\n'
            f'mirror = "file://{place}/repo"\ncomponents = ["own"]\nvariant = "unsigned"\n'
            '[[step]]\npackages = ["more"]\n'
        )
        image = builder.build(recipe, "", Steps(), builder.Options()).image
        with ExitStack() as stack:
            tree = read_image(Store(), image, stack, Steps())
            more = tree.root.find(b"usr/share/more")
            assert more
            assert more.entry.read(99) == b"installed"
            paths = {entry.path for entry in tree.entries()}
            assert not any(path.startswith((b"var/lib/pacman/sync/", b"var/cache/pacman/pkg/")) for path in paths)
        assert recipe_lock.read(recipe)[""].packages["packages more"]["more"].version == "1-1"
        assert b'"purl":"pkg:alpm/arch/more@1-1?arch=any"' in bill(image.hash, Steps())
        assert verifying.verify(recipe, "", Steps()) == image.hash
        # Locked: a newer one is not silently taken.
        package(place / "repo", "more", "2-1", {"usr/share/more": b"newer"})
        with pytest.raises(UserError, match="package more is locked as 1-1.*, the mirror has 2-1"):
            builder.build(recipe, "", Steps(), builder.Options(fresh=True))
    finally:
        web.close()
