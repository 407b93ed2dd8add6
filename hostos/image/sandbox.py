"""Runs things as the root of a user namespace: of nobody outside, and without any privilege there.

Works for root (whose processes in here are then users 1879048192 and up, who own nothing on the
host) and for an ordinary user with subordinate ids (subuid(5); root in here is that user). It needs
neither systemd nor a daemon. Directories that only the host's user may enter (a home) are closed to who
we are in here: what is worked on lies in `scratch()`. user_namespaces(7), pivot_root(2).
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hostos.errors import UserError, failure

IDS = 65536
ROOT_BASE = 0x70000000
"""First user of the sandbox when root uses it: beyond what systemd-nspawn hands out."""

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_PR_SET_PDEATHSIG = 1
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_MNT_DETACH = 2
BROKE = 125
"""Exit status of a sandbox that could not do what it was to do (as distinct from a command in it)."""


@dataclass(frozen=True)
class Ids:
    """Who the users of the sandbox are outside: (inside, outside, count), for users and groups."""

    users: tuple[tuple[int, int, int], ...]
    groups: tuple[tuple[int, int, int], ...]

    @property
    def root(self) -> int:
        return self.users[0][1]


def ids() -> Ids:
    """Raises UserError if this user has no range of subordinate ids."""
    if sys.platform != "linux":
        raise UserError("image builds need Linux's user namespaces", "build in the Vagrant box, or in a machine")
    uid = os.geteuid()
    if uid == 0:
        whole = ((0, ROOT_BASE, IDS),)
        return Ids(whole, whole)
    name = pwd.getpwuid(uid).pw_name
    users, groups = (_subordinate(Path(file), name, uid) for file in ("/etc/subuid", "/etc/subgid"))
    if not users or not groups:
        raise UserError(
            f"{name} has no range of {IDS} subordinate users and groups, which builds run as",
            f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}",
        )
    return Ids(((0, uid, 1), (1, users, IDS - 1)), ((0, os.getegid(), 1), (1, groups, IDS - 1)))


def scratch() -> Path:
    """A directory everybody may pass through, whose content belongs to the sandbox's users. Raises UserError."""
    path = Path(os.environ.get("TMPDIR", "/var/tmp")) / f"hostos-build-{os.geteuid()}"
    try:
        path.mkdir(mode=0o711, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise failure(f"{path}: {error.strerror}", "set TMPDIR to a directory with space") from None
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path} is somebody else's", "set TMPDIR to a directory of your own")
    path.chmod(0o711)
    closed = [each for each in path.absolute().parents if not each.stat().st_mode & 0o001]
    if closed and os.geteuid() == 0:
        raise UserError(
            f"{closed[-1]} is closed to others, so a build, which is nobody here, can't reach {path}",
            "set TMPDIR to a directory that everybody may pass through, e.g. TMPDIR=/var/tmp",
        )
    return path


def own(path: Path, who: Ids) -> Path:
    """A new directory that belongs to root in the sandbox."""
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(path, who.root, who.groups[0][1])
    return path


def _subordinate(file: Path, name: str, uid: int) -> int:
    """The first range that is large enough; 0 if there is none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        owner, _, rest = line.partition(":")
        first, _, count = rest.partition(":")
        if owner in (name, str(uid)) and first.isdigit() and count.isdigit() and int(count) >= IDS - 1:
            return int(first)
    return 0


Work = Callable[[], int]


def run(work: Work, log: int, *, network: bool = False, who: Ids | None = None) -> int:
    """Do `work` as process 1 of new namespaces, with `log` as standard output and error; its status.

    All that is left of it is killed when it returns, and with this process. Without `network` there
    is only a loopback device. Raises UserError if no namespace can be made.
    """
    who = who or ids()
    libc = ctypes.CDLL(None, use_errno=True)
    ready_read, ready_write = os.pipe()
    go_read, go_write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            os.close(ready_read)
            os.close(go_write)
            _enter(libc, ready_write, go_read, network)
            os._exit(_first(libc, work, log))
        except BaseException:
            os._exit(BROKE)
    try:
        os.close(ready_write)
        os.close(go_read)
        if os.read(ready_read, 1) != b"1":
            raise UserError(
                "no user namespace can be made here",
                "allow them: sysctl user.max_user_namespaces=10000 kernel.apparmor_restrict_unprivileged_userns=0",
            )
        _map(child, who)
        os.write(go_write, b"1")
        _, status = os.waitpid(child, 0)
        child = 0
        return os.waitstatus_to_exitcode(status)
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(ready_read)
        os.close(go_write)


def inside_works() -> None:
    """Raises UserError if nothing can be run in a sandbox here."""
    with open(os.devnull, "wb") as log:  # noqa: PTH123
        if status := run(lambda: 0, log.fileno()):
            raise UserError(f"a sandbox can't be set up here (status {status})", "allow user namespaces")


def _enter(libc: ctypes.CDLL, ready: int, go: int, network: bool) -> None:
    """In the child: new namespaces, and root in them once the parent has said who that is."""
    ok = libc.unshare(_NEWUSER) == 0
    os.write(ready, b"1" if ok else b"0")
    if not ok or os.read(go, 1) != b"1":
        os._exit(BROKE)
    os.setresgid(0, 0, 0)
    os.setgroups([])
    os.setresuid(0, 0, 0)
    # After the change of user, which clears it.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    kinds = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | (0 if network else _NEWNET)
    if libc.unshare(kinds):
        os._exit(BROKE)


def _first(libc: ctypes.CDLL, work: Work, log: int) -> int:
    """Fork process 1 of the new process namespace, and wait for it."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) & 0xFF
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setsid()
    code = BROKE
    try:
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        code = work()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(code)


def _map(child: int, who: Ids) -> None:
    for kind, maps in (("uid", who.users), ("gid", who.groups)):
        if os.geteuid() == 0:
            text = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in maps)
            Path(f"/proc/{child}/{kind}_map").write_text(text)
            continue
        words = [str(number) for entry in maps for number in entry]
        try:
            done = subprocess.run([f"new{kind}map", str(child), *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError(f"new{kind}map is needed to build as an ordinary user", "install uidmap") from None
        if done.returncode:
            raise UserError(f"new{kind}map: {done.stderr.strip()}", "see subuid(5) and subgid(5)")


# --- inside -----------------------------------------------------------------------------------------


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = (os.fsencode(source), os.fsencode(target), kind.encode() if kind else None)
    if libc.mount(*words, ctypes.c_ulong(flags), options.encode() or None):
        code = ctypes.get_errno()
        raise OSError(code, f"mount {kind or 'bind'}: {os.strerror(code)}", target)


def become(directory: Path) -> None:
    """Make a directory the root, and leave everything else behind."""
    os.chdir(directory)
    os.chroot(".")
    os.chdir("/")


def pivot(root: Path) -> None:
    """Make the mount at `root` the root file system and unmount the old one. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise failure(f"pivot_root(2) has no known number on {os.uname().machine}")
    os.chdir(root)
    if libc.syscall(number, b".", b"."):
        code = ctypes.get_errno()
        raise OSError(code, f"pivot_root: {os.strerror(code)}", str(root))
    # The old root lies on top of the new one now (pivot_root(2), "pivot_root(".", ".")").
    if libc.umount2(b".", _MNT_DETACH):
        code = ctypes.get_errno()
        raise OSError(code, f"umount: {os.strerror(code)}", ".")
    os.chdir("/")


def overlay(base: Path, lowers: list[str], upper: str, work: str, target: Path) -> None:
    """Mount an overlay at `target` over directories (lowest first), named as seen from `base`. Raises OSError."""
    # Relative names: mount(2) takes a page of options.
    os.chdir(base)
    options = f"lowerdir={':'.join(reversed(lowers))},upperdir={upper},workdir={work},userxattr"
    mount("overlay", str(target), "overlay", MS_NODEV, options)


def execute(command: list[str], *, env: dict[str, str], cwd: str = "/", user: str = "", stdin: int = 0) -> int:
    """Run a command to its end as a child of process 1, reaping whatever it leaves; its status."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(stdin, 0)
            os.chdir(cwd)
            if user:
                _be(user)
            os.execvpe(command[0], command, env)
        except BaseException as error:
            os.write(2, f"{command[0]}: {error}\n".encode())
        os._exit(127)
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status) & 0xFF


def _be(user: str) -> None:
    """`NAME|UID[:GROUP|GID]`, looked up in the root's own passwd(5) and group(5). Raises KeyError."""
    name, _, group = user.partition(":")
    passwd = [line.split(":") for line in _lines("/etc/passwd")]
    groups = [line.split(":") for line in _lines("/etc/group")]
    found = next((row for row in passwd if len(row) > 3 and name in (row[0], row[2])), None)
    if found is None and not name.isdigit():
        raise KeyError(f"the image has no user {name}")
    uid, gid = (int(found[2]), int(found[3])) if found else (int(name), 0)
    if group:
        row = next((row for row in groups if len(row) > 2 and group in (row[0], row[2])), None)
        if row is None and not group.isdigit():
            raise KeyError(f"the image has no group {group}")
        gid = int(row[2]) if row else int(group)
    os.setgroups([int(row[2]) for row in groups if len(row) > 3 and found and found[0] in row[3].split(",")])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
