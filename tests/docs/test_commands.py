"""Every command of the documentation is run.

A page is one story: the lines after `$ ` in its ```console blocks run in order, in one shell, and
each must succeed. ```sh blocks show what a test cannot type (a placeholder, another machine, an
interactive shell); those of the README have tests of their own below.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hostos import paths
from hostos.quickstart import demonstration_image
from hostos.steps import Steps

pytestmark = [pytest.mark.docs, pytest.mark.timeout(3000)]
REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
# Addresses of other people's networks, and what stands for them here.
STAND_INS = {"192.168.1.5:6881": "127.0.0.1"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page: Path) -> list[str]:
    """The typed lines; `> ` continues one."""
    found: list[str] = []
    for block in blocks(page, "console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(line[2:])
            elif line.startswith("> ") and found:
                found[-1] += "\n" + line[2:]
    return found


PAGES = [page for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))] if commands(page)]


@pytest.fixture
def newcomer(tmp_path_factory, monkeypatch):
    """An empty home with a key pair, in a directory that looks like the clone and has a rootfs.tar."""
    tmp_path = tmp_path_factory.mktemp("newcomer")
    image = demonstration_image(Steps())
    caches = paths.cache_dir()
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / ".ssh/id_ed25519"], check=True)
    (home / ".cache").mkdir()
    (home / ".cache/hostos").symlink_to(caches)
    clone = tmp_path / "clone"
    clone.mkdir()
    for path in REPOSITORY.iterdir():
        if not path.name.startswith(".") or path.name == ".venv":
            (clone / path.name).symlink_to(path)
    (clone / "rootfs.tar").symlink_to(image)
    for name in (
        "HOSTOS_HOME",
        "XDG_RUNTIME_DIR",
        "XDG_STATE_HOME",
        "XDG_DATA_HOME",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    # One made in the background would outlive the page, and its home.
    monkeypatch.setenv("HOSTOS_TEMPLATES", "off")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PATH", f"{PROGRAMS}:{os.environ['PATH']}")
    (tmp_path / "run").mkdir(mode=0o700)
    yield clone
    for ending in (["hostos", "kill"], ["hostos", "seed", "stop"]):
        subprocess.run([PROGRAMS / ending[0], *ending[1:]], cwd=clone, capture_output=True, check=False)
    shutil.rmtree(tmp_path, ignore_errors=True)


def run(script: str, cwd: Path, timeout: float = 2700) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script],
        cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        timeout=timeout,
    )  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_work(page, newcomer):
    lines = commands(page)
    for real, here in STAND_INS.items():
        lines = [line.replace(real, here) for line in lines]
    done = run("set -e\nset -x\n" + "\n".join(lines), newcomer)
    assert done.returncode == 0, done.stdout[-6000:]


def test_every_link_between_pages_leads_somewhere():
    for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_four_commands_in_a_row_in_an_empty_home(newcomer):
    digest = run("hostos image publish rootfs.tar --name web/debian 2>/dev/null", newcomer).stdout.strip()
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    shown = "\n".join(blocks(REPOSITORY / "README.md", "sh"))
    typed = [line.partition("  #")[0].strip() for line in shown.splitlines()]
    four = ["invoke build", "hostos up --key ~/.ssh/id_ed25519.pub", "hostos ssh", "hostos container boot <hash>"]
    assert [line for line in typed if line in four] == four
    done = run(
        "set -ex\ninvoke build\nhostos up --key ~/.ssh/id_ed25519.pub\nhostos ssh -- true\n"
        f"name=$(hostos container boot {digest})\nhostos container exec $name cat /etc/os-release\n"
        "hostos container ls\nhostos container stop $name\nhostos down\n",
        newcomer,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "Debian GNU/Linux 13" in done.stdout


def test_quickstart(newcomer):
    done = run("invoke quickstart", newcomer)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "hello from Debian GNU/Linux 13" in done.stdout
    for row in ("build the OS", "boot: SSH answers", "command to first output", "fetched of the image"):
        assert row in done.stdout
