"""The peer of the live-boot benchmark: fetch the whole image with plain libtorrent, mount it, run the
command with systemd-nspawn. Same hash, same swarm, same container options; nothing lazy.

Runs natively and, piped into `python3 -`, in the guest: `IMAGE PEER DIRECTORY COMMAND...`. The command `--boot`
means the image's init, until it has started everything; with the peer `-` IMAGE is a layer that is here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import libtorrent as lt

# What hostos uses too, so that both start from the same session.
SETTINGS: Any = {
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_outgoing_utp": False,
    "enable_incoming_utp": False,
    "allow_multiple_connections_per_ip": True,
    "connection_speed": 100,
    "torrent_connect_boost": 100,
    "min_reconnect_time": 1,
    # Encrypted, as the seed wants it: pe_forced, with RC4.
    "in_enc_policy": 0,
    "out_enc_policy": 0,
    "allowed_enc_level": 2,
    "listen_interfaces": "0.0.0.0:6999",
}
TIMEOUT_S = 600
# hostos says so, too (hostos/live/running.py); the peer must not lose by that.
NO_UPDATE = "systemd.condition_needs_update=0"


def fetch(session: lt.session, params: lt.add_torrent_params, peer: str, directory: Path) -> None:
    """Download a torrent whole. Raises SystemExit after ten minutes."""
    host, port = peer.rsplit(":", 1)
    params.save_path = str(directory)
    params.peers = [(host, int(port))]
    params.flags &= ~lt.torrent_flags.auto_managed & ~lt.torrent_flags.paused
    handle = session.add_torrent(params)
    deadline = time.monotonic() + TIMEOUT_S
    while not handle.status().is_seeding:
        if time.monotonic() > deadline:
            raise SystemExit("download_first: nothing arrived")
        session.wait_for_alert(20)
        session.pop_alerts()
    handle.flush_cache()
    time.sleep(0.05)
    session.pop_alerts()


def main() -> int:
    image, peer, where, *command = sys.argv[1:]
    directory = Path(where)
    directory.mkdir(parents=True)
    if peer == "-":
        return boot(Path(image), directory, command)
    session = lt.session(SETTINGS)
    began = time.monotonic()
    fetch(session, lt.parse_magnet_uri(f"magnet:?xt=urn:btmh:1220{image}"), peer, directory)
    params = lt.add_torrent_params()
    params.ti = lt.torrent_info((directory / "hostos-image/layers/0.torrent").read_bytes())
    fetch(session, params, peer, directory)
    if not command:
        print(f"{time.monotonic() - began:.4f}")
        return 0
    (layer,) = directory.glob("*.squashfs")
    return boot(layer, directory, command)


def boot(layer: Path, directory: Path, command: list[str]) -> int:
    """Mount it below `directory`, run the command in it, and unmount it: the command's status."""
    lower, upper, root = directory / "lower", directory / "upper", directory / "root"
    for path in (lower, upper, root):
        path.mkdir()
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", layer, lower], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", upper], check=True)
    (upper / "data").mkdir()
    (upper / "work").mkdir()
    options = f"lowerdir={lower},upperdir={upper / 'data'},workdir={upper / 'work'}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", root], check=True)
    nspawn = [
        "systemd-nspawn", "--quiet", "--settings=no", "--register=no", "--keep-unit", "--link-journal=no",
        "--timezone=off", "--resolv-conf=off", "--private-network", f"--directory={root}",
    ]  # fmt: skip
    if command == ["--boot"]:
        argv = [
            sys.executable,
            "-m",
            "bench.until_ready",
            *nspawn,
            "--console=read-only",
            "--notify-ready=yes",
            "--boot",
        ]
    else:
        argv = [*nspawn, "--console=pipe", "--as-pid2", "--", *command]
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode
    finally:
        for path in (root, upper, lower):
            subprocess.run(["umount", path], check=False)


if __name__ == "__main__":
    sys.stdout.flush()
    os.environ.setdefault("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    sys.exit(main())
