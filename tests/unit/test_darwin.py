"""macOS as a host, as far as that can be seen without one: what is imported there, and what it says.

Another process pretends to be a Mac: without what Python lacks there, and without the packages that
are for Linux only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostos import hostsystem, paths
from hostos.build import os_build
from hostos.build.engines.debian import DebianEngine
from hostos.build.profile import load_profile
from hostos.errors import UserError
from hostos.machine import accel, network, plan
from hostos.machine.instance import Instance
from hostos.machine.leases import default_sources
from hostos.machine.options import UpOptions
from hostos.steps import Steps

REPOSITORY = Path(__file__).resolve().parents[2]

PRETEND = """
import sys, os, platform, importlib, pkgutil, fcntl, resource, select, signal, socket, time
# These have branches of their own for macOS, which need its C modules.
import asyncio, subprocess, urllib.request, uuid, psutil, paramiko, trio

class Linux:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pyfuse3", "pyfuse3_asyncio"):
            raise ImportError(f"{name} is not there on a Mac")

sys.meta_path.insert(0, Linux())
sys.platform = "darwin"
platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"
GONE = {
    os: "setns unshare memfd_create splice eventfd eventfd_read eventfd_write pidfd_open copy_file_range posix_fadvise "
        "posix_fallocate getxattr setxattr listxattr removexattr pipe2 fdatasync sched_getaffinity sched_setaffinity "
        "getrandom O_PATH O_TMPFILE O_DIRECT O_NOATIME setresuid setresgid getresuid getresgid CLONE_NEWNS",
    socket: "AF_NETLINK AF_PACKET AF_VSOCK SO_BINDTODEVICE SO_PEERCRED TCP_USER_TIMEOUT SOCK_CLOEXEC SOCK_NONBLOCK",
    select: "epoll",
    signal: "pidfd_send_signal sigwaitinfo sigtimedwait SIGPWR SIGRTMIN",
    fcntl: "F_SETPIPE_SZ F_ADD_SEALS F_OFD_SETLK",
    time: "CLOCK_BOOTTIME",
    resource: "prlimit",
}
for module, names in GONE.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""

# What needs FUSE, and so runs in the guest, or natively on Linux.
PARTS = ("containers", "daemon", "fuse", "leftovers", "mounts", "operations", "processes", "root", "running")
LINUX_ONLY = {f"hostos.live.{name}" for name in PARTS}

IMPORT_ALL = """
import hostos
for found in pkgutil.walk_packages(hostos.__path__, "hostos."):
    if found.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(found.name)
    except Exception as error:
        print(found.name, repr(error))
"""


def on_a_mac(script: str, *words: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    if home:
        env["HOSTOS_HOME"] = str(home)
    return subprocess.run(
        [sys.executable, "-c", PRETEND + script, *words], capture_output=True, text=True, env=env, check=False
    )


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")


def test_everything_but_the_guests_own_part_can_be_imported() -> None:
    done = on_a_mac(IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} <= LINUX_ONLY, done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--help",), "Quick start"),
        (("ls", "--json"), "[]"),
        (("image", "ls", "--json"), '"images": []'),
        (("container", "boot", "--help"), "Boot IMAGE"),
    ],
)
def test_commands_start(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = on_a_mac("from hostos.cli import main; main()", *words, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


@pytest.mark.usefixtures("mac")
def test_accelerators() -> None:
    assert (accel.choose("auto", "aarch64").name, accel.choose("auto", "aarch64").fallback) == ("hvf", True)
    assert accel.choose("hvf", "aarch64") == accel.Choice("hvf", "asked for")
    foreign = accel.choose("auto", "x86_64")
    assert (foreign.name, foreign.reason) == ("tcg", "an x86_64 guest on an aarch64 host is emulated")
    with pytest.raises(UserError, match="hvf cannot run an x86_64 guest on an aarch64 host"):
        accel.choose("hvf", "x86_64")


def test_kvm_of_an_arm_host_is_not_asked_for_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(accel, "kvm_device_fault", lambda: "")
    monkeypatch.setattr(accel, "remembered_fault", lambda: "")
    assert accel.choose("auto", "aarch64") == accel.Choice("kvm", "device and CPU flags are there", fallback=True)
    assert accel.choose("auto", "x86_64").name == "tcg"


@pytest.mark.usefixtures("mac")
def test_vmnet_by_root_by_a_daemon_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path))
    instance = Instance.named("box")
    options = UpOptions(net="vmnet")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    sources, helper, daemon = plan.check_network(instance, options)
    assert ([source.name for source in sources], helper, daemon) == (["/var/db/dhcpd_leases (macos)"], None, None)
    monkeypatch.setattr(os, "geteuid", lambda: 501)
    socket = tmp_path / "socket_vmnet"
    monkeypatch.setattr(network, "VMNET_DAEMONS", (tmp_path / "none", socket))
    with pytest.raises(UserError, match="vmnet needs root") as caught:
        plan.check_network(instance, options)
    assert "brew install socket_vmnet" in str(caught.value.hint)
    assert "--net user" in str(caught.value.hint)
    socket.touch()
    assert plan.check_network(instance, options)[2] == socket


@pytest.mark.usefixtures("mac")
def test_leases_are_bootpds() -> None:
    assert [source.spec for source in default_sources(None)] == ["macos:/var/db/dhcpd_leases"]


def test_socket_paths_fit_below_macs_temporary_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOSTOS_HOME", "/Users/somebody/with/a/long/name/" + "x" * 60)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T")
    longest = Instance.named("m" * 40).monitor_socket
    assert len(os.fsencode(longest)) <= paths.SOCKET_PATH_LIMIT == 103


@pytest.mark.usefixtures("mac")
def test_hints_name_what_is_there() -> None:
    assert hostsystem.who_listens().startswith("lsof")
    assert hostsystem.install("squashfs-tools") == "brew install squashfs"
    assert "docs/macos.md" in hostsystem.install("squashfs-tools-ng")


@pytest.mark.usefixtures("mac")
def test_building_says_where_it_can_be_done(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="built on Linux") as caught:
        os_build.build(load_profile("default", "aarch64"), DebianEngine(), Steps(), tmp_path / "dist")
    assert "docs/macos.md" in str(caught.value.hint)
    assert not (tmp_path / "dist").exists()


def test_no_two_files_differ_in_case_alone() -> None:
    """macOS's file system takes them for one."""
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    names = listed.stdout.splitlines()
    if not names:
        pytest.skip("not a git checkout")
    assert len({name.lower() for name in names}) == len(names)


class TestBootstrap:
    """./bootstrap with a `uname` that says Darwin, a `brew` that writes down what it is asked for, and no pip."""

    @pytest.fixture
    def programs(self, tmp_path: Path) -> Path:
        place = tmp_path / "bin"
        place.mkdir()
        for name in ("dirname", "cksum", "cat", "mkdir", "sh"):
            (place / name).symlink_to(
                next(Path(path) / name for path in ("/usr/bin", "/bin") if (Path(path) / name).exists())
            )
        self.program(place, "uname", "case $1 in -s) echo Darwin ;; *) echo arm64 ;; esac")
        self.program(
            place, "python3", f'case $2 in *venv*ensurepip*) exit 0 ;; esac; echo "python $*" >> {tmp_path}/said'
        )
        return place

    def program(self, place: Path, name: str, body: str) -> None:
        (place / name).write_text(f"#!/bin/sh\n{body}\n")
        (place / name).chmod(0o755)

    def run(self, programs: Path, checkout: Path) -> subprocess.CompletedProcess[str]:
        checkout.mkdir()
        for name in ("bootstrap", "pyproject.toml"):
            (checkout / name).write_bytes((REPOSITORY / name).read_bytes())
        pip = checkout / ".venv/bin"
        pip.mkdir(parents=True)
        self.program(pip, "python", f'echo "pip $*" >> {checkout.parent}/said')
        return subprocess.run(
            ["/bin/sh", "bootstrap"],
            cwd=checkout,
            env={"PATH": str(programs)},
            capture_output=True,
            text=True,
            check=False,
        )

    def test_homebrew_installs_what_is_missing(self, programs: Path, tmp_path: Path) -> None:
        self.program(programs, "brew", f'echo "brew $*" >> {tmp_path}/said\n[ "$1" = install ] || [ "$3" = squashfs ]')
        done = self.run(programs, tmp_path / "checkout")
        assert done.returncode == 0, done.stderr
        said = (tmp_path / "said").read_text()
        assert "brew install qemu python@3.13\n" in said
        assert "-e .[dev]\n" in said
        assert "native" not in said

    def test_without_homebrew_it_says_where_to_get_it(self, programs: Path, tmp_path: Path) -> None:
        done = self.run(programs, tmp_path / "checkout")
        assert done.returncode == 1
        assert "https://brew.sh" in done.stderr
        assert "HOSTOS_SKIP_SYSTEM=1" in done.stderr
