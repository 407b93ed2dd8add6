"""A node of a DHT of the tests' own: `dht_node.py HOST:PORT`. It knows nobody and waits to be asked."""

import signal
import sys

import libtorrent as lt

from hostos.live.swarm_settings import SwarmSettings

settings = SwarmSettings(public=True, nodes=(sys.argv[1],)).settings()
session = lt.session({"listen_interfaces": sys.argv[1], "enable_upnp": False, "enable_natpmp": False, **settings})
while not session.listen_port():
    session.wait_for_alert(1000)
    session.pop_alerts()
print("ready", flush=True)
signal.pause()
