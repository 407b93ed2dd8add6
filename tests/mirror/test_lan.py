"""Two machines of one network, each with its cache, a mirror behind a slow link; real apt in both."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack

import pytest

from bench.mirror import ADDRESSES, lan
from hostos.mirror.upstreams import Apt
from mirror.cache import AptClient, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")


def test_they_find_each_other_and_share(archive, trusted, make_cache, tmp_path):
    total = sum(path.stat().st_size for path in archive.packages.values())
    with lan() as net, ExitStack() as stack:
        net.serve(stack, archive.root)
        url = f"http://{ADDRESSES['mirror']}:8000"
        source = f"deb [signed-by={trusted}] {url} stable main"
        entry = Apt(url, ("stable",), ("main",), ("amd64",), str(trusted))
        caches, shares = {}, {name: f"{ADDRESSES[name]}:3144" for name in ("first", "second")}
        for name, share in shares.items():
            caches[name] = make_cache(entry, inside=net.inside(name)).start(share=share, lan=True)

        def client(name: str) -> AptClient:
            made = AptClient(
                tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}", [source], caches[name].proxy, net.inside(name)
            )
            made.update()
            made.download("small", "middle", "large")
            assert made.debs() == {path.name: path.read_bytes() for path in archive.packages.values()}
            return made

        def sent() -> int:
            command = [*net.inside("mirror"), "cat", "/proc/net/dev"]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            return int(next(line for line in shown.splitlines() if "eth0" in line).split()[9])

        wait_until(lambda: shares["first"] in {peer["address"] for peer in caches["second"].status()["peers"]}, 30)
        wait_until(lambda: shares["second"] in {peer["address"] for peer in caches["first"].status()["peers"]}, 30)
        client("first")
        before = sent()
        client("second")
        assert sent() - before < 0.05 * total
        figures = caches["second"].stats()["archives"][f"{ADDRESSES['mirror']}:8000"]
        assert figures["from_peers"] > 0.95 * (figures["from_peers"] + figures["from_mirror"])
        # The mirror cut off: what the two have is enough.
        subprocess.run(["ip", "-n", f"{net.prefix}mirror", "link", "set", "eth0", "down"], check=True)
        caches["second"].hostos("prune", "--all")
        client("second")
        # Going away is said, too.
        caches["first"].stop()
        wait_until(lambda: caches["second"].status()["peers"] == [], 30)
