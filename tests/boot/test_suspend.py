"""A suspended machine comes back where it was."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytestmark = pytest.mark.boot

COUNT = "systemd-run --quiet sh -c 'n=0; while :; do n=$((n+1)); echo $n > /run/count; sleep .1; done'"


def test_a_process_goes_on_where_it_was(hostos: Any) -> None:
    """Also of a clone whose template is gone: all of its memory was saved."""
    before = hostos.up("--accel", "tcg", "--memory", "256", "--warm", "--json").json()
    hostos("ssh", "--", COUNT).ok()
    hostos("ssh", "--", "until test -s /run/count; do sleep .1; done; sleep 1").ok()
    hostos("suspend").ok()
    assert hostos.qemus() == []
    assert hostos("status", "--json").json()["state"] == "suspended"
    assert (hostos.directory() / "saved" / "state").stat().st_mode & 0o777 == 0o600
    assert "suspended" in hostos("ls").ok().out
    for words, says in (
        (["down"], "hostos resume"),
        (["suspend"], "hostos resume"),
        (["up", "--memory", "512"], "not with other options"),
        (["rm", "default"], "--force"),
    ):
        refused = hostos(*words)
        assert refused.status == 2
        assert says in refused.err
    hostos("template", "prune", "--size", "0").ok()
    assert hostos("template", "ls", "--json").json() == []
    time.sleep(2)

    resumed = hostos("up").ok()
    assert "state loaded" in resumed.err
    after = hostos("status", "--json").json()
    assert (after["state"], after["ssh"]["port"]) == ("running", before["ssh"]["port"])
    assert not (hostos.directory() / "saved").exists()
    first = int(hostos("ssh", "--", "cat", "/run/count").ok().out)
    assert first > 5
    time.sleep(1)
    assert int(hostos("ssh", "--", "cat", "/run/count").ok().out) > first
    assert abs(float(hostos("ssh", "--", "date", "+%s").out) - time.time()) < 30
    assert hostos("ssh", "--", "busybox ping -c 1 -W 5 10.0.2.2 > /dev/null && echo reached").out == "reached\n"
    facts = hostos("inspect").json()
    assert facts["config"]["memory_mib"] == 256
    assert facts["run"]["pid"] == facts["pid"]
    assert "run.json" in facts["files"]
    assert hostos("down", "--json").json()["clean"] is True
