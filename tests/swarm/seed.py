"""A libtorrent seed for the tests: `seed.py DIRECTORY HOST:PORT [lying|slow]` (every *.torrent of the directory).

A lying one speaks the protocol like any other, encryption included, but of the layers it has other bytes.
"""

import signal
import sys
import tempfile
from pathlib import Path

import libtorrent as lt

from hostos.live.nodelay import NoDelay
from hostos.live.swarm_settings import limit_everyone

directory, address = Path(sys.argv[1]), sys.argv[2]
lying, slow = (sys.argv[3:] == [how] for how in ("lying", "slow"))
session = lt.session(
    {
        "listen_interfaces": address,
        "outgoing_interfaces": address.rpartition(":")[0],
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "allow_multiple_connections_per_ip": True,
        "close_redundant_connections": False,
        "unchoke_slots_limit": -1,
        "in_enc_policy": 1,
        # Whether it checks what it sends.
        "disable_hash_checks": lying,
        "upload_rate_limit": 8000 if slow else 0,
        "alert_mask": int(lt.alert.category_t.error_notification | lt.alert.category_t.status_notification),
    }
)
limit_everyone(session)
handles = []
for path in sorted(directory.glob("*.torrent")):
    parameters = lt.load_torrent_buffer(path.read_bytes())
    parameters.save_path = str(directory / path.stem)
    if lying and parameters.ti.name().endswith(".squashfs"):
        parameters.save_path = tempfile.mkdtemp()
        name = parameters.ti.files().file_path(0)
        spoiled = bytearray((directory / path.stem / name).read_bytes())
        for place in range(5000, len(spoiled), 16384):
            spoiled[place] ^= 0xFF
        (Path(parameters.save_path) / name).write_bytes(spoiled)
        # A seed looks at what it has before it sends it for the first time.
        parameters.have_pieces = [True] * parameters.ti.num_pieces()
        parameters.flags |= lt.torrent_flags.no_verify_files
    else:
        parameters.flags |= lt.torrent_flags.seed_mode
    parameters.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
    handles.append(session.add_torrent(parameters))
waiting = {str(handle.info_hashes().v2) for handle in handles}
while waiting or not session.listen_port():
    session.wait_for_alert(1000)
    for alert in session.pop_alerts():
        if isinstance(alert, lt.listen_failed_alert):
            sys.exit(alert.message())
        if isinstance(alert, lt.torrent_checked_alert):
            waiting.discard(str(alert.handle.info_hashes().v2))
nodelay = NoDelay()
nodelay.scan()
nodelay.start()
print("ready", flush=True)
signal.pause()
