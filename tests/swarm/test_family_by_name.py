"""A family of images built on one host and booted by name on another, as a container and as the machine's system.

Two hosts in network namespaces, each with a home of its own; real guests, a real Debian. The second knows nothing but
a public key, and where to ask: the first one's web server and seed, or a node of a DHT on a third host.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hostos.paths import cache_dir
from hostos.quickstart import demonstration_image
from hostos.steps import Steps
from swarm.conftest import HERE, PORT, Helper, Lab, laboratory

pytestmark = [pytest.mark.boot, pytest.mark.timeout(3600)]
NAMES = f"http://{Lab.address(1)}:6880"
NODE = f"{Lab.address(3)}:7700"
BOOT_SECONDS = 1500.0
RECIPE = """
[type.Arch64]
name = "steve/arch64"
source-date-epoch = 1700000000
base.tar = "rootfs.tar"

[type.NVidia]
name = "steve/nvidia"
source-date-epoch = 1700000000
from = "Arch64"
step = [{run = "echo driver > /etc/nvidia"}]

[type.Gaming]
name = "steve/gaming"
source-date-epoch = 1700000000
from = "NVidia"
step = [{copy = "game", to = "/opt/game"}, {run = "ln -s /opt/game/version /etc/game"}]
boot.command = ["sh", "-c", "cat /etc/nvidia /etc/game"]
"""


@dataclass
class Steve:
    """The first host: recipes, keys, names, and the seed. `published`: hashes, the latest last."""

    hostos: Any
    workshop: Path
    key: str
    node: Helper
    published: list[str] = field(default_factory=list)
    serving: Any = None

    def publish(self, version: str) -> str:
        """Build the family with that game in it, and let the name mean it."""
        (self.workshop / "game/version").write_text(f"{version}\n")
        words = ("image", "build", self.workshop / "family.toml", "--type", "Gaming")
        made = self.hostos(*words, timeout=BOOT_SECONDS).ok().out.strip()
        number = self.hostos("image", "push", made, "gaming").ok().out.strip()
        self.published.append(made)
        assert int(number) == len(self.published)
        return str(made)

    @property
    def record(self) -> Path:
        """What his web server and he himself say the name means."""
        return Path(self.hostos.home / "data/names/records" / self.key / "gaming")

    def serve(self) -> None:
        """Serve his names anew, and put them into the DHT."""
        if self.serving is not None:
            self.serving.terminate()
            self.serving.communicate(timeout=60)
        self.serving = self.hostos.start("name", "serve", "--listen", NAMES.removeprefix("http://"))
        assert b"serving on" in self.serving.stderr.readline()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with laboratory("names") as made:
        yield made


@pytest.fixture(scope="module")
def steve(
    lab: Lab,
    os_dir: Path,
    hostos_with: Callable[[Path], AbstractContextManager[Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Steve]:
    if not shutil.which("tar2sqfs"):
        pytest.skip("needs tar2sqfs (apt-get install squashfs-tools-ng)")
    with ExitStack() as stack:
        hostos = stack.enter_context(hostos_with(os_dir))
        hostos.enter = lab.enter(1)
        # What was built before need not be packed again; it is kept by its content.
        hostos.home.mkdir()
        (hostos.home / "cache").symlink_to(cache_dir())
        workshop = tmp_path_factory.mktemp("workshop")
        (workshop / "family.toml").write_text(RECIPE)
        (workshop / "game").mkdir()
        (workshop / "rootfs.tar").symlink_to(demonstration_image(Steps()))
        node = Helper.start(str(HERE / "dht_node.py"), NODE, enter=lab.enter(3))
        stack.callback(node.stop)
        hostos("seed", "start", "--listen", f"{lab.address(1)}:{PORT}").ok()
        made = Steve(hostos, workshop, hostos("name", "create", "gaming").ok().out.strip(), node)
        hostos("name", "dht", NODE).ok()
        made.publish("one")
        yield made


@pytest.fixture
def stranger(lab: Lab, os_dir: Path, hostos_with: Callable[[Path], AbstractContextManager[Any]]) -> Iterator[Any]:
    """The second host, with an empty home."""
    with hostos_with(os_dir) as hostos:
        hostos.enter = lab.enter(2)
        yield hostos


def boot(hostos: Any, name: str = "steve/gaming") -> Any:
    """Its own command, in a container."""
    return hostos("container", "boot", name, timeout=BOOT_SECONDS).ok()


def boot_as_root(hostos: Any) -> None:
    hostos("up", "-m", "system", "--os", hostos.os_dir, "--root", "steve/gaming", timeout=BOOT_SECONDS).ok()


def inside(hostos: Any, command: str) -> str:
    """What a command says in the machine whose system it is."""
    return str(hostos("ssh", "-m", "system", "--", command).ok().out)


@pytest.mark.parametrize("through", ["peers", "DHT"])
def test_built_here_booted_there_by_name(steve: Steve, stranger: Any, through: str) -> None:
    there = steve.hostos
    assert len(there("image", "history", "steve/gaming").ok().out.splitlines()) == 4
    shown = there("image", "tree", "steve/arch64").ok().out
    assert re.findall(r"steve/\w+", shown) == ["steve/arch64", "steve/nvidia", *["steve/gaming"] * len(steve.published)]

    at = ("--at", NAMES) if through == "peers" else ()
    stranger("name", "add", "steve", steve.key, *at).ok()
    if through == "DHT":
        stranger("name", "dht", NODE).ok()
    before, number = steve.published[-1], len(steve.published)
    steve.serve()

    # As a container: nothing of it was here before.
    stranger("up", "--os", stranger.os_dir, timeout=BOOT_SECONDS).ok()
    ran = boot(stranger)
    assert ran.out.split() == ["driver", (steve.workshop / "game/version").read_text().strip()]
    assert re.search(rf"^hostos: steve/gaming is {before} \(number {number} of .*, good until ", ran.err, re.M), ran.err
    assert stranger("image", "ls").out == "", "it was not installed"

    # As the machine's system.
    boot_as_root(stranger)
    assert inside(stranger, "cat /proc/1/comm /etc/nvidia /etc/game; findmnt -no FSTYPE /").split()[:3] == [
        "systemd",
        "driver",
        (steve.workshop / "game/version").read_text().strip(),
    ]
    stranger("down", "-m", "system").ok()

    # The owner moves it, and whoever boots it by name has the new one.
    version = f"after-{through}"
    after = steve.publish(version)
    steve.serve()
    assert after != before
    ran = boot(stranger)
    assert ran.out.splitlines() == ["driver", version]
    assert f"steve/gaming is {after} (number {number + 1} of" in ran.err
    boot_as_root(stranger)
    assert inside(stranger, "cat /etc/game").strip() == version
    stranger("kill", "-m", "system").ok()
    # Yesterday's, by its number.
    assert version not in boot(stranger, f"steve/gaming@{number}").out
    log = stranger("name", "log", "steve/gaming").ok().out
    assert re.findall(r"steve/gaming@(\d+)", log) == [str(number + 1), str(number)]

    # Whoever serves the name goes back to an old record, which its owner did sign.
    good = steve.record.read_bytes()
    steve.record.write_bytes(b"".join(good.splitlines(keepends=True)[:-1]))
    steve.serve()
    try:
        ran = boot(stranger)
        if through == "peers":
            # (Nodes of a DHT don't take the older one in the first place: BEP 44.)
            assert "a roll-back, refused" in ran.err
        assert f"steve/gaming is {after} (number {number + 1} of" in ran.err
        assert ran.out.splitlines() == ["driver", version]
    finally:
        steve.record.write_bytes(good)
