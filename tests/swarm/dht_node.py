"""A node of a DHT of the tests' own: `dht_node.py HOST:PORT`. It knows nobody and waits to be asked."""

import signal
import sys

import libtorrent as lt

from hostos.live.swarm_settings import SwarmSettings

settings = SwarmSettings(public=True, nodes=(sys.argv[1],)).settings()
# More than a node should, for tests that ask much at once.
settings |= {"dht_upload_rate_limit": 1 << 20, "dht_block_ratelimit": 1 << 10}
session = lt.session({"listen_interfaces": sys.argv[1], "enable_upnp": False, "enable_natpmp": False, **settings})
while not session.listen_port():
    session.wait_for_alert(1000)
    session.pop_alerts()
print("ready", flush=True)
signal.pause()
