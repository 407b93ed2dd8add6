"""`hostos os …`: OS builds, published under a hash and fetched by it."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from hostos.cli.common import json_option, print_json, steps, talk_options
from hostos.errors import UserError, failure
from hostos.hostsystem import install
from hostos.machine import os_image
from hostos.paths import data_dir, private_dir


@click.group()
def os() -> None:
    """OS builds: publish one under a hash, fetch one by its hash.

    For computers on which the OS cannot be built, as Macs, or need not be.
    """


@os.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--arch", metavar="ARCH", help="Without DIRECTORY: for which architecture.  [default: this host's]")
@talk_options
def publish(directory: Path | None, arch: str | None) -> None:
    """Make an image of an OS build (default: the one `hostos up` takes) and print its hash.

    \b
    For several architectures under one hash:
      hostos os publish dist/default-x86_64
      hostos os publish dist/default-aarch64
      hostos image index os/default os/default-x86_64 os/default-aarch64
    """
    from hostos.image import publish as publishing
    from hostos.image import seeding

    found = os_image.find(directory, arch=os_image.canonical(arch) if arch else None)
    os_image.verify(found)
    name = f"os/{found.profile}-{found.arch}"
    with tempfile.TemporaryDirectory() as scratch:
        # The files alone, so that the same build has the same hash whenever and by whomever it was made.
        archive = Path(scratch, "os.tar")
        with tarfile.open(archive, "w") as tar:
            for file in sorted(found.directory.rglob("*")):
                if file.is_file():
                    data = file.read_bytes()
                    info = tarfile.TarInfo(file.relative_to(found.directory).as_posix())
                    info.size, info.mode = len(data), 0o644
                    tar.addfile(info, io.BytesIO(data))
        made = publishing.publish(archive, name, steps(), architecture=found.arch)
    seeded = seeding.reload()
    click.echo(made.hash)
    click.echo(f"{name}; {'seeding it already' if seeded else 'offer it with: hostos seed start'}", err=True)


@os.command()
@click.argument("image")
@click.option("--peer", "peers", multiple=True, metavar="ADDR:PORT", help="Who has it. Repeatable.")
@click.option("--arch", metavar="ARCH", help="Of several: for which architecture.  [default: this host's]")
@click.option("--deadline", type=click.FloatRange(1, 3600), default=60.0, show_default=True, metavar="SECONDS",
              help="For finding it, and for each part of it.")  # fmt: skip
@talk_options
def fetch(image: str, peers: Sequence[str], arch: str | None, deadline: float) -> None:
    """Fetch the OS build IMAGE (a hash or a magnet link) and install it where `hostos up` looks.

    Every block is checked against the hash; nobody is asked but the peers you name.
    """
    from hostos.image.download import download
    from hostos.live.torrents import parse_image_reference, parse_peer

    reference = parse_image_reference(image)
    asked = tuple(dict.fromkeys((*map(parse_peer, peers), *reference.peers)))
    if not asked:
        raise UserError(f"who has {reference.info_hash[:16]}…?", "name a peer: --peer HOST:PORT")
    if not shutil.which("unsquashfs"):
        raise UserError("unsquashfs is needed to unpack an OS", install("squashfs-tools"))
    machine = os_image.canonical(arch) if arch else os_image.host_arch()
    place = private_dir(data_dir() / "os")
    told = steps()
    with tempfile.TemporaryDirectory(dir=place, prefix=".fetch-") as scratch:
        got = download(reference.info_hash, asked, Path(scratch), told, machine=machine, deadline=deadline)
        if len(got.layers) != 1:
            raise UserError(f"{got.bundle.manifest.name} is no OS build: it has {len(got.layers)} layers")
        unpacked = Path(scratch, "os")
        with told.step("unpack"):
            _unpack(got.layers[0], unpacked)
        try:
            found = os_image.load(unpacked)
            os_image.verify(found)
        except UserError as error:
            raise UserError(
                f"{got.bundle.manifest.name} is no OS build ({error.message.replace(str(unpacked), 'it')})",
                "what `hostos os publish` printed is wanted here; a container's image: hostos container boot",
            ) from None
        target = place / f"{found.profile}-{found.arch}"
        # A machine that runs from the old one keeps its open files.
        if target.exists():
            target.rename(Path(scratch, "old"))
        unpacked.rename(target)
    click.echo(target)


def _unpack(layer: Path, target: Path) -> None:
    """Plain files of the user's own: no owners, no devices, no attributes."""
    command = ["unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-dest", str(target), str(layer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise failure(f"unsquashfs failed: {said[-1] if said else done.returncode}", "is the disk full?")


@os.command(name="ls")
@json_option
def list_(as_json: bool) -> None:
    """List the OS builds that `hostos up` finds: in ./dist, and installed."""
    found = []
    for place in (Path.cwd() / "dist", data_dir() / "os"):
        for directory in sorted(place.glob("*-*")) if place.is_dir() else []:
            try:
                image = os_image.load(directory)
            except UserError:
                continue
            found.append(
                {
                    "schema": 1,
                    "directory": str(directory),
                    "profile": image.profile,
                    "architecture": image.arch,
                    "kernel_version": image.kernel_version,
                }
            )
    if as_json:
        print_json(found)
        return
    for each in found:
        click.echo(f"{each['directory']}: {each['profile']} for {each['architecture']}, Linux {each['kernel_version']}")
