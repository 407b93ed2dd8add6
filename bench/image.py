"""Images: what a child costs, how fast they are packed and imported, and `up --root` over a shaped link.

Each beside what one would do without hostos: mksquashfs, `umoci unpack`, downloading everything and then booting.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import network, oci_layout, root_start
from bench.harness import Comparison, Series, chosen, prepare, publish
from bench.live import PROGRAM, client, seed
from hostos.errors import UserError, failure
from hostos.image.pack import BLOCK_SIZE, LEVEL
from hostos.image.store import Store
from hostos.live.client import Client
from hostos.quickstart import demonstration_image
from hostos.steps import Steps

PARENT = 1 << 30
"""Bytes in the parent's files; the Debian tree and, to fill it up, noise."""
CHANGE = 10_000_000
"""Bytes of the child's one new file, which no compression makes smaller."""
CHUNK = 1 << 20
TOOLS = {"mksquashfs": "squashfs-tools", "umoci": "umoci", "unsquashfs": "squashfs-tools"}


def run(rounds: int, steps: Steps, only: Sequence[str] = ()) -> Path:
    """Measure and publish. `only`: some of `children`, `packing`, `import`, `root`.

    Raises `UserError` without root or a program, or when a side fails.
    """
    for program, package in TOOLS.items():
        if shutil.which(program) is None:
            raise UserError(f"{program} is needed to compare with", f"apt-get install {package}")
    parts = {"packing": packing, "import": importing, "children": children, "root": root}
    wanted = chosen(only, parts)
    before = prepare()
    comparisons = []
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostos-bench-", dir="/var/tmp")))
        net = stack.enter_context(network.link())
        place = Place(work, demonstration_image(steps), net, steps)
        for name in wanted:
            comparisons += parts[name](rounds, place)
    return publish("image", comparisons, before)


@dataclass(frozen=True)
class Place:
    """Where it is measured. `work`: a directory for everything; `archive`: the quick start's Debian; `net`: seed and
    client, not shaped."""

    work: Path
    archive: Path
    net: network.Link
    steps: Steps

    def env(self, name: str) -> dict[str, str]:
        """With a home of that name."""
        return {**os.environ, "HOSTOS_HOME": str(self.work / name), "HOSTOS_TEMPLATES": "off"}

    def tree(self) -> Path:
        """The archive, unpacked once."""
        found = self.work / "tree"
        if not found.is_dir():
            found.mkdir()
            with self.steps.step("unpack the archive"):
                words: list[str | Path] = [
                    "tar",
                    "--xattrs",
                    "--xattrs-include=*",
                    "--numeric-owner",
                    "-xf",
                    self.archive,
                    "-C",
                    found,
                ]
                subprocess.run(words, check=True)
        return found


def packing(rounds: int, place: Place) -> list[Comparison]:
    """A directory packed, hashed and stored, beside mksquashfs alone with the same compression."""
    tree = place.tree()
    peer, ours = Series("mksquashfs"), Series("hostos image publish")
    sizes: dict[str, float] = {}
    env = place.env("packing")
    target = place.work / "peer.squashfs"
    by_hand: list[str | Path] = [
        "mksquashfs", tree, target, "-comp", "zstd", "-Xcompression-level", str(LEVEL), "-b", str(BLOCK_SIZE),
        "-noappend", "-no-exports", "-xattrs", "-no-progress", "-quiet",
    ]  # fmt: skip
    by_us: list[str | Path] = [PROGRAM, "image", "publish", tree, "--name", "bench/pack"]
    for number in range(rounds):
        _timed(place.steps, peer, number, by_hand)
        sizes["mksquashfs, MB"] = target.stat().st_size / 1e6
        target.unlink()
        image = _timed(place.steps, ours, number, by_us, env)
        sizes["hostos, MB"] = Store(place.work / "packing/data").get(image).manifest.size / 1e6
        subprocess.run([PROGRAM, "image", "rm", image], env=env, check=True, capture_output=True)
    ours.notes |= sizes
    # At least 80 % of its speed.
    return [Comparison("pack and publish a Debian tree", peer.name, [peer, ours], {ours.name: 1.25})]


def importing(rounds: int, place: Place) -> list[Comparison]:
    """An OCI image of two layers imported, beside unpacking it (as root, with umoci)."""
    layout = place.work / "layout"
    with place.steps.step("make an OCI image"):
        oci_layout.write(layout, [place.archive, oci_layout.noise(place.work / "noise.tar")])
    peer, ours = Series("umoci unpack"), Series("hostos image import")
    env = place.env("import")
    bundle = place.work / "bundle"
    for number in range(rounds):
        _timed(place.steps, peer, number, ["umoci", "unpack", "--image", f"{layout}:bench", bundle])
        shutil.rmtree(bundle)
        words: list[str | Path] = [PROGRAM, "image", "import", layout, "--tag", "bench", "--name", "bench/oci"]
        image = _timed(place.steps, ours, number, words, env)
        subprocess.run([PROGRAM, "image", "rm", image], env=env, check=True, capture_output=True)
    return [Comparison("import of an OCI image", peer.name, [peer, ours], {ours.name: 1.3})]


def children(rounds: int, place: Place) -> list[Comparison]:
    """A child of a parent of 1 GiB that has been booted before: what is stored for it, and what comes over the wire."""
    tree = place.work / "family-tree"
    shutil.copytree(place.tree(), tree, symlinks=True, ignore=lambda where, _: ["dev"] if where == str(tree) else [])
    _fill(tree / "srv", PARENT)
    env, store = place.env("family"), Store(place.work / "family/data")
    with place.steps.step("publish the parent"):
        publishing = (PROGRAM, "image", "publish", tree)
        parent = _published([*publishing, "--name", "bench/parent"], env)
    change = Series("the change itself", "MB")
    stored, sent = Series("stored for it", "MB"), Series("sent to who has booted the parent", "MB")
    own = Series("the child's own layer, and its metadata", "MB")
    fetched, alone = Series("received, parent booted before", "MB"), Series("received, nothing there", "MB")
    for number in range(rounds):
        (tree / "srv/change").write_bytes(os.urandom(CHANGE))
        before = _disk_use(store.root)
        with place.steps.step(f"publish the child {number + 1}"):
            child = _published([*publishing, "--from", "bench/parent", "--name", "bench/child"], env)
        change.samples.append(CHANGE / 1e6)
        stored.samples.append((_disk_use(store.root) - before) / 1e6)
        metadata = sum(len(data) for data in store.bundle(child).files.values())
        own.samples.append((store.get(child).manifest.layers[-1].size + metadata) / 1e6)
        with ExitStack() as stack:
            peer = seed(stack, place.net.enter(place.net.seed), network.SEED, env)
            with place.steps.step(f"boot parent and child {number + 1}") as step:
                with client(place.net.enter(place.net.client), place.work / "client") as (asked, _):
                    _boot(place, asked, parent, peer, "os-release")
                    fetched.samples.append(_boot(place, asked, child, peer, "change"))
                with client(place.net.enter(place.net.client), place.work / "client") as (asked, _):
                    alone.samples.append(_boot(place, asked, child, peer, "change"))
                step.detail = f"{fetched.samples[-1]:.2f} MB; without the parent {alone.samples[-1]:.2f} MB"
        sent.samples.append(fetched.samples[-1])
        subprocess.run([PROGRAM, "image", "rm", child], env=env, check=True, capture_output=True)
    return [
        Comparison(
            "a change of 10 MB on a parent of 1 GiB",
            change.name,
            [change, stored, sent],
            {stored.name: 1.1, sent.name: 1.1},
        ),
        # What is on top: the protocol's own messages, TCP and IP.
        Comparison("booting a child", own.name, [own, fetched, alone], {fetched.name: 1.1}),
    ]


def root(rounds: int, place: Place) -> list[Comparison]:
    return root_start.measure(rounds, place.net, place.archive, place.work, place.steps)


READS = {"os-release": "cat /etc/os-release", "change": "cat /srv/change"}


def _boot(place: Place, asked: Client, image: str, peer: str, what: str) -> float:
    """Run a command that reads that file; the MB that arrived meanwhile."""
    enter = place.net.enter(place.net.client)
    before = network.received(place.net.client)
    prepared = asked.ask("prepare", image=image, peers=[peer], command=["sh", "-c", READS[what]], name="bench")
    done = subprocess.run([*enter, *prepared["argv"]], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    asked.ask("release", name="bench")
    if done.returncode or (what == "change" and len(done.stdout) != CHANGE):
        raise failure(f"{READS[what]} in the container: {done.stderr.decode(errors='replace')}")
    return (network.received(place.net.client) - before) / 1e6


def _fill(directory: Path, size: int) -> None:
    """Noise, until the tree's files are `size` bytes."""
    done = subprocess.run(["du", "-sb", directory.parent], stdout=subprocess.PIPE, check=True)
    left = size - int(done.stdout.split()[0])
    number = 0
    while left > 0:
        (directory / f"noise{number}").write_bytes(os.urandom(min(64 * CHUNK, left)))
        left -= 64 * CHUNK
        number += 1


def _disk_use(directory: Path) -> int:
    """Bytes its files take on the disk."""
    done = subprocess.run(["du", "-s", "--block-size=1", directory], stdout=subprocess.PIPE, check=True)
    return int(done.stdout.split()[0])


def _timed(
    steps: Steps, series: Series, number: int, words: Sequence[str | Path], env: Mapping[str, str] | None = None
) -> str:
    """Seconds into the series; what it printed. The disk is idle before."""
    os.sync()
    with steps.step(f"{series.name} {number + 1}") as step:
        began = time.monotonic()
        printed = _published(words, env)
        series.samples.append(time.monotonic() - began)
        step.detail = f"{series.samples[-1]:.2f} s"
    return printed


def _published(words: Sequence[str | Path], env: Mapping[str, str] | None) -> str:
    done = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise failure(f"{' '.join(map(str, words[:3]))} failed: {done.stderr[-500:]}")
    return done.stdout.strip()
