"""`python3 -m hostos.live`: run the live-boot daemon, in a guest or natively as root."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hostos.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m hostos.live", description="Mounts images from their hashes and runs them in containers."
    )
    parser.add_argument("--socket", type=Path, default=Path("/run/hostos/live.sock"), help="where it is asked")
    parser.add_argument("--cache", type=Path, default=Path("/run/hostos/cache"), help="what has been fetched")
    parser.add_argument("--mounts", type=Path, default=Path("/run/hostos/live"), help="mount points")
    parser.add_argument("--state", type=Path, help="files of the containers (default: containers/ by the socket)")
    parser.add_argument("--listen", default="0.0.0.0:6881", metavar="ADDRESS:PORT", help="for other peers")
    parser.add_argument(
        "--cache-size", metavar="SIZE", help="mount a tmpfs of this size there, e.g. 60%% (default: use the directory)"
    )
    parser.add_argument(
        "--cache-limit", metavar="SIZE", help="what layers may take, e.g. 20g (default: 90%% of its file system)"
    )
    parser.add_argument(
        "--complete",
        default="off",
        metavar="off|on|RATE",
        help="fetch the rest of each image while idle",
    )
    parser.add_argument(
        "--no-systemd", action="store_true", help="PID 1 is not systemd: run containers as plain processes"
    )
    parser.add_argument(
        "--encryption", default="required", metavar="required|preferred|off", help="of connections between peers"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="what containers keep (default: the disk, or memory)")
    arguments = parser.parse_args()
    # After the arguments: --help must not pay for libtorrent.
    from hostos.live.cache import parse_limit
    from hostos.live.daemon import Config, run
    from hostos.live.schedule import Rest
    from hostos.live.swarm_settings import SwarmSettings

    systemd = not arguments.no_systemd and Path("/run/systemd/system").is_dir()
    try:
        run(
            Config(
                socket=arguments.socket.absolute(),
                cache=arguments.cache.absolute(),
                mounts=arguments.mounts.absolute(),
                state=(arguments.state or arguments.socket.parent / "containers").absolute(),
                listen=arguments.listen,
                cache_size=arguments.cache_size,
                limit=parse_limit(arguments.cache_limit) if arguments.cache_limit else None,
                rest=Rest.parse(arguments.complete),
                systemd=systemd,
                keep=arguments.keep.absolute() if arguments.keep else None,
                swarm=SwarmSettings(encryption=arguments.encryption),
            )
        )
    except UserError as error:
        print(f"hostos-live: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
