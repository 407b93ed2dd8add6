"""btfs, Debian's file system of a torrent, as the peer: the same layer over the same link, mounted the same way.

It knows version 1 of torrents only, so a plain libtorrent seeds the layer to it as one: run as a program,
`python3 -m bench.btfs ADDRESS:PORT FILE`, which prints the magnet link.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import libtorrent as lt

from bench import network
from bench.download_first import SETTINGS
from bench.harness import Comparison, Series
from bench.live import COMMAND, DEADLINE_S, PEER_SCRIPT, RATE_MBIT, Target, client, first_byte, first_output
from hostos.errors import UserError, failure
from hostos.steps import Steps

GOAL = 1 / 8
PORT = 6997
PIECE = 64 * 1024
"""As the image's own."""


def measure(rounds: int, net: network.Link, target: Target, plain: Target, layer: Path, steps: Steps) -> Comparison:
    """First output, from the bare hash of the image and of its layer. `target`: with a trace; `layer`: of `plain`."""
    if shutil.which("btfs") is None:
        raise UserError("btfs is not installed", "apt-get install btfs, or name other parts: --only init --only crowd")
    traced, untraced = Series("hostos, bare hash"), Series("hostos, bare hash, no trace")
    peer = Series("btfs, magnet link of the layer")
    enter = net.enter(net.client)
    with _seeded(net, layer) as magnet:
        for number in range(rounds):
            for series, image in ((traced, target), (untraced, plain)):
                with steps.step(f"beside btfs: {series.name} {number + 1}") as step:
                    began = time.monotonic()
                    with client(enter, target.work / "lazy") as (asked, _):
                        series.samples.append(first_output(asked, enter, replace(image, bundle=None), began)[0])
                    step.detail = f"{series.samples[-1]:.2f} s"
            with steps.step(f"btfs {number + 1}") as step:
                peer.samples.append(_btfs(enter, magnet, target.work / "btfs"))
                step.detail = f"{peer.samples[-1]:.2f} s"
    title = f"first output over {RATE_MBIT} Mbit/s, native, beside btfs"
    return Comparison(title, peer.name, [peer, traced, untraced], {traced.name: GOAL, untraced.name: GOAL})


def _btfs(enter: list[str], magnet: str, place: Path) -> float:
    """Seconds from starting btfs to the first output of the command in the layer that it shows."""
    with ExitStack() as stack:
        shown, data = place / "shown", place / "data"
        for path in (shown, data):
            path.mkdir(parents=True)
        stack.callback(lambda: shutil.rmtree(place))
        began = time.monotonic()
        command = [*enter, "btfs", "-f", f"--data-directory={data}", magnet, str(shown)]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        stack.callback(process.terminate)
        stack.callback(lambda: subprocess.run(["umount", "-l", shown], stderr=subprocess.DEVNULL, check=False))
        while not (layers := list(shown.glob("*.squashfs"))):
            if process.poll() is not None or time.monotonic() - began > DEADLINE_S:
                raise failure("btfs shows nothing")
            time.sleep(0.02)
        took = time.monotonic() - began
        run = [*enter, sys.executable, str(PEER_SCRIPT), str(layers[0]), "-", str(place / "boot"), *COMMAND]
        return took + first_byte(run)


@contextmanager
def _seeded(net: network.Link, layer: Path) -> Iterator[str]:
    """The magnet link under which the seed's namespace has the layer."""
    command = [*net.enter(net.seed), sys.executable, "-m", "bench.btfs", f"{network.SEED}:{PORT}", str(layer)]
    where = Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=where) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def serve(listen: str, file: Path) -> None:
    """Seed `file` as a torrent of version 1, until standard input ends; prints the magnet link."""
    settings: Any = {**SETTINGS, "listen_interfaces": listen, "in_enc_policy": 1, "out_enc_policy": 1}
    session = lt.session(settings)
    storage = lt.file_storage()
    lt.add_files(storage, str(file))
    creator = lt.create_torrent(storage, PIECE, lt.create_torrent.v1_only)
    lt.set_piece_hashes(creator, str(file.parent))
    params = lt.add_torrent_params()
    params.ti = lt.torrent_info(creator.generate())
    params.save_path = str(file.parent)
    params.flags |= lt.torrent_flags.seed_mode
    params.flags &= ~lt.torrent_flags.auto_managed & ~lt.torrent_flags.paused
    session.add_torrent(params)
    print(f"magnet:?xt=urn:btih:{params.ti.info_hashes().v1}&x.pe={listen}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
