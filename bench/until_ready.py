"""Runs a container with an init until that says that it has started everything, prints `1`, and ends it.

    python3 -m bench.until_ready SYSTEMD-NSPAWN ARGUMENTS…

systemd-nspawn passes on what the init says (sd_notify(3)): its status is "Ready." once its queue of jobs is empty.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT_S = 120.0
# A current systemd wants control groups of version 2, whatever the host's own still uses.
UNIFIED = "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY"


def main() -> int:
    with tempfile.TemporaryDirectory() as place, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(Path(place) / "notify"))
        told.settimeout(TIMEOUT_S)
        env = {**os.environ, "NOTIFY_SOCKET": str(Path(place) / "notify"), UNIFIED: "1"}
        process = subprocess.Popen(sys.argv[1:], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        leader = 0
        try:
            while "Ready." not in (said := told.recv(4096).decode(errors="replace")):
                if found := re.search(r"X_NSPAWN_LEADER_PID=(\d+)", said):
                    leader = int(found[1])
            print("1", flush=True)
        finally:
            # nspawn ends, and tidies up, when its container does.
            os.kill(leader or process.pid, signal.SIGKILL)
            process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
