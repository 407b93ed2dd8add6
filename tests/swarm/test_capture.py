"""What a running container has changed becomes a layer, exactly as its overlay has it."""

from __future__ import annotations

import io
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostos.image import child, overlay, seeding
from hostos.image.entries import arrange
from hostos.image.layers import read_image
from hostos.image.publish import publish
from hostos.image.sources import read_plain_tar
from hostos.image.store import Store
from hostos.live.client import Client
from hostos.live.upper import capability
from hostos.steps import Steps
from swarm.conftest import ROOT, Daemon, Published, run, wait_until

SCRIPT = """
echo changed > /home/user/note
mkdir -p /srv/new; echo mine > /srv/new/file; chmod 4711 /srv/new/file
rm /var/data0
mv /home/user /home/moved
mkdir /home/user; echo fresh > /home/user/only
rm -rf /home/moved/link
echo not kept > /tmp/left
echo ready; while :; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def shop(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    home = tmp_path_factory.mktemp("capture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSTOS_HOME", str(home))
        patch.setenv("XDG_RUNTIME_DIR", str(home))
        made = publish(published.tree, "swarm/capture", Steps()).hash
        yield made, seeding.ensure_started().address
        seeding.stop()


def changes_of(client: Client, name: str, stack: ExitStack) -> list[overlay.Entry]:
    answer = client.ask("capture", name=name)
    sent = subprocess.run(answer["argv"], capture_output=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    found, _ = read_plain_tar(io.BytesIO(sent.stdout), Path(name), stack)
    return arrange(overlay.from_upper(found), name)


def test_a_running_container_is_captured(daemon: Daemon, shop: tuple[str, str]) -> None:
    image, seed = shop
    store = Store()
    with daemon.client() as client, ExitStack() as stack:
        answer = client.ask("prepare", image=image, peers=[seed], command=["sh", "-c", SCRIPT], hold=True, name="work")
        with subprocess.Popen(answer["argv"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as container:
            assert container.stdout
            assert container.stdout.readline() == b"ready\n"
            entries = changes_of(client, "work", stack)
            assert container.poll() is None
            client.ask("stop", name="work", deadline=1.0)
        wait_until(lambda: not client.ask("list")["containers"], 20)
        made = child.add_layer(
            store, store.get(image), entries, "swarm/captured", Steps(),
            boot=store.get(image).manifest.boot, made_by="capture",
        )  # fmt: skip
        tree = read_image(store, store.get(made.hash), stack, Steps())
        paths = {entry.path for entry in tree.entries()}
        assert {b"srv/new/file", b"home/moved/note", b"home/moved/same", b"home/user/only"} <= paths
        assert not {b"var/data0", b"home/user/note", b"home/moved/link", b"tmp/left"} & paths
        file = tree.root.find(b"srv/new/file").entry  # type: ignore[union-attr]
        assert (file.uid, file.gid, file.mode & 0o7777) == (0, 0, 0o4711)
        moved = tree.root.find(b"home/moved/note").entry  # type: ignore[union-attr]
        assert (moved.uid, dict(moved.xattrs)) == (1000, {b"user.colour": b"blue"})
        assert made.packed.size < 65536
        # Booted, it is what it was.
        seeding.reload()
        ran = run(
            client, made.hash, seed, "sh", "-c", "cat /home/moved/note /home/user/only /srv/new/file; ls /home/user"
        )
    assert ran.stdout == b"changed\nfresh\nmine\nonly\n", ran.stderr


def test_what_can_not_be_captured(daemon: Daemon, shop: tuple[str, str]) -> None:
    from hostos.errors import UserError

    with daemon.client() as client:
        with pytest.raises(UserError, match="there is no container 'nobody'"):
            client.ask("capture", name="nobody")
        client.ask("mount", image=shop[0], peers=[shop[1]], name="only-mounted")
        with pytest.raises(UserError, match="is only mounted"):
            client.ask("capture", name="only-mounted")
        client.ask("unmount", name="only-mounted")


def test_capabilities_given_in_the_container_are_its_own() -> None:
    masks = struct.pack("<4I", 0x2000, 0, 0, 0)
    given = struct.pack("<I", 0x03000001) + masks + struct.pack("<I", 524288)
    assert capability(given, 524288) == struct.pack("<I", 0x02000001) + masks
    assert capability(given, 1) == given
    assert capability(given[:20], 524288) == given[:20]
