"""What goes wrong with sources, and Buildroot's own menu, with a real Buildroot tree.

HOSTOS_BUILDROOT_SOURCE=<directory> says where one is; HOSTOS_BUILDROOT_SITE=<directory> names source
archives, and HOSTOS_BUILDROOT_OVERRIDE=<file> an override file, for the test that needs all of them.
"""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from hostos.build.engines import buildroot_tools
from hostos.build.engines.buildroot import BuildrootEngine, Options, Prepared
from hostos.build.engines.buildroot_host import has_header
from hostos.build.engines.buildroot_progress import Progress
from hostos.build.engines.buildroot_source import Source
from hostos.build.profile import CONFIGS, load_profile
from hostos.errors import UserError
from hostos.steps import Steps

pytestmark = pytest.mark.build
PROFILE = load_profile("minimal", "x86_64")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTOS_HOME", str(home))


@pytest.fixture(scope="module")
def engine(buildroot: Source, home: Path) -> BuildrootEngine:
    """Offline, with a primary site whose only archive is wrong, and one package from a directory."""
    site = home / "site"
    site.mkdir()
    (site / "dbus-1.14.10.tar.xz").write_bytes(b"not what it was")
    override = home / "override.mk"
    override.write_text(f"UTIL_LINUX_OVERRIDE_SRCDIR = {home}/util-linux\n")
    options = Options(str(buildroot.path), primary_site=str(site), offline=True, override_file=override)
    return BuildrootEngine(options)


@pytest.fixture(scope="module")
def prepared(engine: BuildrootEngine, home: Path) -> Prepared:
    source, toolchain = engine.tools(PROFILE, Steps())
    return engine.prepare(PROFILE, source, toolchain, home / "output")


def test_a_source_that_is_not_the_one_its_hash_names_stops_everything(
    engine: BuildrootEngine, prepared: Prepared
) -> None:
    with pytest.raises(
        UserError, match=r"(?s)dbus-1\.14\.10\.tar\.xz is not.*expected ba1f21.*got +[0-9a-f]{64}"
    ) as caught:
        engine.make(prepared, Progress(1, lambda text: None), "dbus-source")
    assert caught.value.status == 1
    assert not (prepared.settings.dl_dir / "dbus/dbus-1.14.10.tar.xz").exists()


def test_the_kernel_is_held_to_its_hash_too(engine: BuildrootEngine, prepared: Prepared, home: Path) -> None:
    """Buildroot by itself takes a kernel of another version than those in its menu unchecked."""
    archive = f"linux-{prepared.kernel_version}.tar.xz"
    (home / "site" / archive).write_bytes(b"not what it was")
    with pytest.raises(UserError, match=rf"(?s){re.escape(archive)} is not the file.*expected .*got"):
        engine.make(prepared, Progress(1, lambda text: None), "linux-source")
    assert not (prepared.settings.dl_dir / "linux" / archive).exists()


def test_offline_names_every_source_that_is_not_there(engine: BuildrootEngine, home: Path) -> None:
    nowhere = home / "nothing"
    nowhere.mkdir(exist_ok=True)
    options = replace(engine.options, primary_site=str(nowhere))
    with pytest.raises(UserError, match=r"archive\(s\) are neither in") as caught:
        buildroot_tools.fill(PROFILE, options, home / "bundle", Steps())
    assert caught.value.status == 2
    for file in ("busybox-1.37.0.tar.bz2 (busybox)", "host-gcc-final", "glibc", "(linux)", "(linux-headers)"):
        assert file in caught.value.message
    assert "util-linux-2" not in caught.value.message


def test_an_overridden_package_is_not_held_to_the_licence_of_another_version(prepared: Prepared) -> None:
    words = buildroot_tools.own_licences(prepared)
    assert "UTIL_LINUX_HASH_FILES=" in words
    assert not any(word.startswith("DBUS_") for word in words)


def test_a_bundle_of_sources_is_all_a_build_needs(buildroot: Source, home: Path) -> None:
    site, override = (os.environ.get(f"HOSTOS_BUILDROOT_{name}") for name in ("SITE", "OVERRIDE"))
    if not site:
        pytest.skip("no source archives at hand: HOSTOS_BUILDROOT_SITE=<directory> names them")
    options = Options(
        str(buildroot.path),
        toolchain="debian",
        primary_site=site,
        offline=True,
        override_file=Path(override) if override else None,
    )
    profile = load_profile("default", "x86_64")
    first = buildroot_tools.fill(profile, options, home / "bundle-1", Steps())
    again = buildroot_tools.fill(profile, replace(options, primary_site=str(first)), home / "bundle-2", Steps())
    files = {path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file()}
    assert files == {path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file()}
    assert "busybox/busybox-1.37.0.tar.bz2" in files


MENU = """
import sys
from pathlib import Path
from hostos.build.engines import buildroot_tools
from hostos.build.engines.buildroot import Options
from hostos.build.profile import load_profile
from hostos.steps import Steps
source, configs = sys.argv[1:]
buildroot_tools.CONFIGS = Path(configs)
print(buildroot_tools.menuconfig(load_profile("minimal", "x86_64"), Options(source), "buildroot", Steps()))
"""


def test_the_menu_keeps_only_what_was_chosen(buildroot: Source, tmp_path: Path) -> None:
    if not has_header("ncurses.h"):
        pytest.skip("menuconfig needs curses: apt-get install libncurses-dev")
    (tmp_path / "features").mkdir()
    screen = Screen([sys.executable, "-c", MENU, str(buildroot.path), str(tmp_path)])
    screen.expect("Target options")
    screen.type("/")
    screen.expect("Enter")
    screen.type("PACKAGE_HTOP\r")
    screen.expect("Location:")
    screen.type("1")
    screen.expect("show kernel threads", "htop")
    screen.type("y")
    for _ in range(12):
        screen.type("\x1b\x1b")
        if screen.shows("save your new configuration"):
            break
    screen.type("\r")
    assert screen.wait() == 0
    written = tomllib.loads((tmp_path / "features/custom.toml").read_text())
    # ncurses, which htop selects, follows from it.
    assert written["buildroot"] == {"PACKAGE_HTOP": True}
    assert not (CONFIGS / "features/custom.toml").exists()


class Screen:
    """A program on a terminal."""

    def __init__(self, command: list[str]) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
        self._process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self._text = ""

    def expect(self, *any_of: str) -> None:
        ends = time.monotonic() + 180
        while not any(self.shows(text) for text in any_of):
            assert time.monotonic() < ends, self._text[-2000:]
            assert self._process.poll() is None, self._text[-2000:]

    def type(self, keys: str) -> None:
        self._text = ""
        os.write(self._master, keys.encode())
        # curses tells the escape key from escape sequences by waiting
        ends = time.monotonic() + 1.5
        while time.monotonic() < ends:
            self.shows("")

    def shows(self, text: str) -> bool:
        ready, _, _ = select.select([self._master], [], [], 0.2)
        if ready:
            try:
                self._text += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                time.sleep(0.1)
        return text in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._text)

    def wait(self) -> int:
        ends = time.monotonic() + 120
        while self._process.poll() is None and time.monotonic() < ends:
            self.shows("")
        os.close(self._master)
        return self._process.wait(10)
