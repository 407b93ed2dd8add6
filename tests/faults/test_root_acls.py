"""One of everything in an image, compared in booted machines: as a container's, and as the machine's own system."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import trees

from hostos.quickstart import demonstration_image
from hostos.steps import Steps

pytestmark = [
    pytest.mark.boot,
    pytest.mark.fault,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make and compare owners, devices and capabilities"),
    pytest.mark.skipif(not shutil.which("setfacl"), reason="needs setfacl (acl)"),
]
SHOW = f"{Path(trees.__file__).read_text()}\nprint(snapshot(Path('/srv/exact')))\n"
ACL = "import os; print(os.getxattr('/srv/exact/shared', 'system.posix_acl_access').hex())"
CHANGES = """
import os
os.chmod("/srv/exact/suid", 0o4711)
os.setxattr("/srv/exact/shared/one", "user.new", b"1")
os.removexattr("/srv/exact/null", "system.posix_acl_access")
open("/srv/made", "w").write("made in the root")
os.remove("/srv/exact/hole")
"""


@pytest.fixture
def exact(tmp_path: Path) -> Path:
    tree = tmp_path / "changes/srv/exact"
    for name in ("usr/bin", "etc", "empty"):
        (tree / name).mkdir(parents=True)
    (tree / "usr/bin/prog").write_bytes(os.urandom(300_000))
    (tree / "etc/motd").write_text("hello\n" * 1000)
    (tree / "link").symlink_to("etc/motd")
    os.mkfifo(tree / "pipe", 0o622)
    for name in (b"new\nline", b"\xff\xfe", b'-rf "q" \\ x', "grüße".encode(), b"n" * 255):
        Path(os.fsdecode(os.fsencode(tree) + b"/" + name)).write_bytes(name)
    trees.add_what_is_hard(tree)
    # Those mean something to the overlay.
    (tree / "whiteout").unlink()
    os.removexattr(tree / "etc", "trusted.overlay.opaque")
    return tree


def python(hostos: Any, code: str) -> str:
    return str(hostos("ssh", "--", "python3", "-", input=code, timeout=900).ok().out)


def test_one_of_everything(hostos: Any, exact: Path) -> None:
    hostos("image", "publish", demonstration_image(Steps()), "--name", "test/system", timeout=1500).ok()
    changes = exact.parents[1]
    hostos("image", "publish", changes, "--changes", "--from", "test/system", "--name", "test/exact").ok()
    expected = trees.snapshot(exact)

    # In a container users from 65536 on are nobody; ACLs are those of its own users.
    hostos("up", "--os", hostos.os_dir, timeout=1500).ok()
    boot = ("container", "boot", "test/exact", "--", "python3", "-c")
    there = bytes.fromhex(hostos(*boot, ACL, timeout=600).ok().out)
    assert there[:12] == os.getxattr(exact / "shared", "system.posix_acl_access")[:12]
    assert (1000).to_bytes(4, "little") in there
    hostos("kill").ok()

    # In a root everything is as it was.
    hostos("up", "--os", hostos.os_dir, "--root", "test/exact", timeout=1500).ok()
    assert ast.literal_eval(python(hostos, SHOW)) == expected

    # What is changed in it becomes a layer, without what is this machine's own.
    python(hostos, CHANGES)
    listed = hostos("image", "capture", "root", "--list", timeout=300).ok().out.splitlines()
    assert {"C /srv/exact/suid", "C /srv/exact/null", "A /srv/made", "D /srv/exact/hole"} <= set(listed)
    assert not [line for line in listed if "ssh_host" in line or "machine-id" in line or "authorized_keys" in line]
    assert "C /srv/exact/pipe" not in listed
    hostos("image", "capture", "root", "--name", "test/captured", timeout=300).ok()
    hostos("kill").ok()
    hostos("up", "--os", hostos.os_dir, "--root", "test/captured", timeout=1500).ok()
    found = ast.literal_eval(python(hostos, SHOW))
    assert hostos("ssh", "--", "cat", "/srv/made").ok().out == "made in the root"
    del expected[b"hole"]
    suid, one, null = expected[b"suid"], expected[b"shared/one"], expected[b"null"]
    assert found[b"suid"][0] == suid[0] & ~0o7777 | 0o4711
    assert found[b"suid"][4] == suid[4]
    assert (b"user.new" in dict(found[b"shared/one"][-1])) or ("user.new" in dict(found[b"shared/one"][-1]))
    assert not [name for name, _ in found[b"null"][-1] if "acl" in name]
    changed = {b"", b"suid", b"shared/one", b"null"}
    assert found.keys() == expected.keys()
    # A hard link breaks when one of its names is changed, as in any overlay: the other is as it was, and alone.
    for path in expected.keys() - changed - {b"shared/two", b"shared"}:
        assert found[path] == expected[path], path
    assert (one[0], null[0] & 0o170000) == (found[b"shared/one"][0], found[b"null"][0] & 0o170000)
