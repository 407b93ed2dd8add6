"""Containers in a real guest that want more than they may have, and what is kept of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.boot, pytest.mark.fault]

SHELL = ("/usr/bin/busybox", "sh", "-c")
BOMB = "for n in $(/usr/bin/busybox seq 300); do /usr/bin/busybox sleep 60 & done; echo all of them"
HOG = "/usr/bin/busybox tail /dev/zero; echo status $?; echo still here"


def test_limits_hold_and_changes_are_kept(hostos: Any, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "usr/bin").mkdir(parents=True)
    (tree / "root").mkdir()
    shutil.copy("/bin/busybox", tree / "usr/bin/busybox")
    hostos("image", "publish", tree, "--name", "limited").ok()
    boot = ("container", "boot", "limited")
    try:
        hostos.up("--memory", "512", "--disk", "128M")
        bomb = hostos(*boot, "--pids", "50", "--", *SHELL, BOMB)
        assert "can't fork" in bomb.err
        assert "all of them" not in bomb.out
        hog = hostos(*boot, "--memory", "48m", "--", *SHELL, HOG).ok()
        assert "status 137" in hog.out
        assert "still here" in hog.out
        # The machine is none the worse for it.
        assert hostos("run", "systemctl", "is-active", "hostos-live").ok().out.strip() == "active"
        hostos(*boot, "--persist", "box", "--", *SHELL, "echo kept > /root/note").ok()
        hostos("down").ok()
        hostos.up("--memory", "512", "--disk", "128M")
        again = hostos(*boot, "--persist", "box", "--", *SHELL, "read note < /root/note; echo $note").ok()
        assert again.out.strip() == "kept"
    finally:
        hostos("down")
