"""A snapshot that boots: a container, lazily fetched from its hash, whose apt installs from it with no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from swarm.conftest import Daemon, copy_tool, daemon, make_tree, run  # noqa: F401

from mirror.test_snapshot import filled, program

TOOLS = (
    *("apt-get", "apt-config", "dpkg", "dpkg-deb", "dpkg-split", "gpgv", "start-stop-daemon", "tar"),
    # What apt-key, a script, is made of.
    *(
        "basename",
        "chown",
        "cmp",
        "cut",
        "diff",
        "dirname",
        "find",
        "grep",
        "head",
        "ln",
        "mktemp",
        "readlink",
        "sed",
        "sort",
    ),
    *("tail", "touch", "tr", "uname", "uniq", "wc"),
)
DIRECTORIES = (
    *("etc/apt/apt.conf.d", "etc/apt/preferences.d", "etc/apt/trusted.gpg.d", "etc/apt/sources.list.d"),
    *("var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/apt/lists/partial", "var/cache/apt/archives/partial"),
    *("var/log/apt", "etc/dpkg/dpkg.cfg.d", "usr/share/dpkg"),
)
METHODS = ("file", "copy", "store", "gpgv")
SEED = "127.0.0.9"
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems: needs root"),
    pytest.mark.skipif(not shutil.which("tar2sqfs"), reason="needs tar2sqfs"),
]


def make_system(tree: Path) -> None:
    """apt and dpkg of this machine, and what they need."""
    make_tree(tree)
    for name in TOOLS:
        copy_tool(name, tree)
    shutil.copy("/sbin/ldconfig", tree / "usr/bin/ldconfig")
    if Path("/usr/bin/apt-key").exists():
        shutil.copy("/usr/bin/apt-key", tree / "usr/bin/apt-key")
    methods = tree / "usr/lib/apt/methods"
    methods.mkdir(parents=True)
    for name in METHODS:
        source = Path("/usr/lib/apt/methods") / name
        shutil.copy(source, methods / name)
        shown = subprocess.run(["ldd", source], capture_output=True, text=True, check=True).stdout
        for library in (word for word in shown.split() if word.startswith("/")):
            target = tree / "usr" / library.removeprefix("/usr").lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copy(Path(library).resolve(), target)
    for directory in DIRECTORIES:
        (tree / directory).mkdir(parents=True, exist_ok=True)
    for table in ("cputable", "ostable", "tupletable", "abitable"):
        shutil.copy(f"/usr/share/dpkg/{table}", tree / "usr/share/dpkg")
    (tree / "var/lib/dpkg/status").touch()
    (tree / "var/lib/dpkg/available").touch()
    (tree / "etc/apt/apt.conf.d/test").write_text('APT::Sandbox::User "root";\n')


def test_it_boots_and_installs(cache, web, archive, make_client, tmp_path, daemon):  # noqa: F811
    assert isinstance(daemon, Daemon)
    system = tmp_path / "system"
    make_system(system)
    program(cache, "image", "publish", str(system), "--name", "test/system")
    filled(cache, make_client)
    image = cache.hostos("publish", web.url, "--name", "test/installer", "--onto", "test/system").stdout.strip()
    size = json.loads(program(cache, "image", "inspect", image, "--json"))["size"]
    # Nobody but the seed is there any more.
    web.faults.only, web.faults.down = ".*", True
    cache.stop()
    program(cache, "seed", "start", "--listen", SEED)
    try:
        port = json.loads(program(cache, "seed", "status", "--json"))["port"]
        script = "apt-get -q update && apt-get -q -y install small && cat /opt/small/data > /dev/null && ls /opt"
        with daemon.client() as client:
            ran = run(client, image, f"{SEED}:{port}", "sh", "-c", f"{script} 2>&1")
    finally:
        program(cache, "seed", "stop")
    shown = ran.stdout.decode()
    print(shown, ran.figures, size)
    assert ran.status == 0, shown + ran.stderr.decode()
    assert "Setting up small (1.0)" in shown
    assert shown.splitlines()[-1] == "small"
    # Lazily: what was not installed was not fetched.
    fetched = ran.figures["fetched"]
    assert fetched < size - archive.packages["large"].stat().st_size / 2
