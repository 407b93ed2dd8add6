"""A wire that loses packets: `lossy.py NETNS-A ADDRESS-A NETNS-B ADDRESS-B SHARE`, e.g. 0.3.

A tun interface in each of two network namespaces, and what goes into one comes out of the other, or doesn't.
(netem is not in every kernel; a TCP proxy can't lose packets.)
"""

import ctypes
import fcntl
import os
import random
import select
import struct
import subprocess
import sys

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
CLONE_NEWNET = 0x40000000


def wire(namespace: str, address: str, peer: str) -> int:
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(there, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns {namespace}")
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"wire", IFF_TUN | IFF_NO_PI))
    subprocess.run(["ip", "address", "add", address, "peer", peer, "dev", "wire"], check=True)
    subprocess.run(["ip", "link", "set", "wire", "up"], check=True)
    return tun


def main() -> None:
    first, first_address, second, second_address, share = sys.argv[1:]
    ends = [wire(first, first_address, second_address), wire(second, second_address, first_address)]
    print("ready", flush=True)
    noise = random.Random(7)
    while True:
        for end in select.select(ends, [], [])[0]:
            packet = os.read(end, 65536)
            if noise.random() >= float(share):
                os.write(ends[1] if end == ends[0] else ends[0], packet)


main()
