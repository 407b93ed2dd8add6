"""The host's own SSH connection into a guest: control key, pinned host key, deadlines.

People use `hostos ssh` (hostos.machine.ssh); this is for programs. No agent, no user keys, no
known_hosts file of the user's: nothing outside the instance directory has a say.
"""

from __future__ import annotations

import contextlib
import logging
import select
import shlex
import socket
import sys
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from hostos.errors import failure
from hostos.machine.identity import Identity, ensure_identity
from hostos.machine.instance import Instance

# paramiko imports invoke, which is a third of its time, for "Match exec" in an ssh_config: none is read here. It
# takes it for not installed.
_without = {} if "invoke" in sys.modules else {"invoke": None}
sys.modules |= _without  # type: ignore[arg-type]
try:
    import paramiko
finally:
    for _name in _without:
        del sys.modules[_name]

# Banner errors while a guest boots are normal and reported here as what they mean.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

# The status ssh(1) gives for a command ended by a signal, or of unknown fate.
UNKNOWN_STATUS = 255
# The fastest for an emulated guest among those every supported sshd has.
_KEX = ("curve25519-sha256@libssh.org",)
_CIPHERS = ("aes128-ctr", "aes256-ctr")


class ConnectionLost(Exception):  # noqa: N818
    """The guest or its sshd went away. The message says during what."""


@dataclass(frozen=True)
class Completed:
    """A command that ran: what it said, and its exit status (255 if a signal ended it)."""

    stdout: bytes
    stderr: bytes
    status: int


def connect(instance: Instance, *, deadline: float) -> Connection:
    """Log into the running `instance` as root within `deadline` seconds.

    Raises UserError if it is not running, does not answer, or is not who it should be.
    """
    instance.require_running()
    return dial(instance, deadline=deadline)


def dial(instance: Instance, *, deadline: float) -> Connection:
    """`connect` without asking first whether the machine is ready."""
    port = instance.ssh_port
    hint = f"look at: hostos status -m {instance.name}; hostos logs -m {instance.name}"
    give_up = time.monotonic() + deadline
    try:
        sock = socket.create_connection((instance.address, port), timeout=deadline)
        return login(sock, ensure_identity(instance.identity_dir, instance.name), give_up - time.monotonic())
    except (OSError, ConnectionLost) as error:
        raise failure(
            f"machine {instance.name!r} does not answer on {instance.address}:{port}: {error}", hint
        ) from error


def login(sock: socket.socket, identity: Identity, deadline: float) -> Connection:
    """Authenticate over `sock`, which becomes the connection's own, within `deadline` seconds.

    Raises ConnectionLost, and UserError if the host key is not the pinned one or the guest does
    not take the control key.
    """
    try:
        transport = paramiko.Transport(sock)
    except BaseException:
        sock.close()
        raise
    connection = Connection(transport)
    try:
        with connection.deadline(deadline):
            security = transport.get_security_options()
            security.key_types = ("ssh-ed25519",)
            security.kex = _KEX
            security.ciphers = _CIPHERS
            transport.banner_timeout = transport.auth_timeout = transport.handshake_timeout = deadline
            transport.start_client(timeout=deadline)
            shown = transport.get_remote_server_key()
            if shown.asbytes() != b64decode(identity.host.line.split()[1]):
                raise failure(
                    f"the guest shows another host key ({shown.fingerprint}) than the one made for it",
                    "something else answers on its port: hostos kill, then hostos up",
                )
            control = paramiko.Ed25519Key.from_private_key_file(str(identity.control.private))
            transport.auth_publickey("root", control)
    except paramiko.AuthenticationException as error:
        # The same exception stands for a connection that ended or was too slow.
        refused = transport.is_active() and "timeout" not in str(error).lower()
        connection.close()
        if refused:
            raise failure("the guest refuses the control key", "hostos kill, then hostos up") from error
        raise ConnectionLost(str(error)) from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        connection.close()
        raise ConnectionLost(str(error) or type(error).__name__) from error
    except BaseException:
        connection.close()
        raise
    return connection


class Connection:
    """An authenticated connection. A context manager; not for use by several threads at once."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self.transport = transport

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.transport.close()

    @contextlib.contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Cut the connection if the body takes longer: paramiko has waits without a time limit."""
        timer = threading.Timer(max(seconds, 0.001), self.transport.close)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def start(
        self, argv: Sequence[str], *, timeout: float = 30.0, terminal: Terminal | None = None
    ) -> paramiko.Channel:
        """Start `argv` (each word arrives as it is) and return its channel.

        Raises ConnectionLost.
        """
        try:
            with self.deadline(timeout):
                channel = self.transport.open_session(timeout=timeout)
                if terminal:
                    channel.get_pty(terminal.kind, terminal.columns, terminal.rows)
                # exec: no shell in between, so signals and exit status are the command's own.
                channel.exec_command(f"exec {shlex.join(argv)}")
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise ConnectionLost(f"cannot start {argv[0]}: {error or type(error).__name__}") from error
        return channel

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",
        timeout: float,
        watch: Callable[[], None] | None = None,
    ) -> Completed:
        """Run `argv` to its end within `timeout` seconds, both its streams drained.

        `watch` is called several times a second meanwhile; what it raises ends the wait. Raises
        ConnectionLost, and UserError (status 1) on time-out.
        """
        give_up = time.monotonic() + timeout
        channel = self.start(argv, timeout=timeout)
        out, err = bytearray(), bytearray()
        left = memoryview(input)
        with contextlib.closing(channel):
            channel.settimeout(0.05)
            if not left:
                channel.shutdown_write()
            while True:
                left = self._feed(channel, left)
                ended = has_ended(channel)
                moved = drain(channel, out, err)
                if ended and not moved:
                    break
                if watch:
                    watch()
                if time.monotonic() > give_up:
                    raise failure(f"{argv[0]} in the guest did not end within {timeout:.0f} s")
                if not moved:
                    # Readable for ever once the stream has ended: then only the status is missing.
                    waiting = [] if channel.eof_received else [channel]
                    select.select(waiting, [], [], 0.02 if left or not waiting else 0.1)
            return Completed(bytes(out), bytes(err), self.status(channel, argv[0]))

    def _feed(self, channel: paramiko.Channel, left: memoryview) -> memoryview:
        if not left or not channel.send_ready():
            return left
        try:
            left = left[channel.send(left[: 1 << 15].tobytes()) :]
        except TimeoutError:
            return left
        except OSError:
            # It ended without reading all of its input, as it may.
            return left[:0]
        if not left:
            with contextlib.suppress(OSError):
                channel.shutdown_write()
        return left

    def status(self, channel: paramiko.Channel, what: str) -> int:
        """The exit status of a channel that has ended; raises ConnectionLost if it was cut off."""
        status = channel.recv_exit_status()
        if status != -1:
            return status
        if not self.transport.is_active():
            raise ConnectionLost(f"the connection ended while {what} ran")
        return UNKNOWN_STATUS

    def signal(self, channel: paramiko.Channel, name: str) -> None:
        """Send signal `name` ("INT", "TERM" …) to a command's process group (RFC 4254 §6.9)."""
        message = paramiko.Message()
        message.add_byte(paramiko.common.cMSG_CHANNEL_REQUEST)
        message.add_int(channel.remote_chanid)
        message.add_string("signal")
        message.add_boolean(False)
        message.add_string(name)
        self.transport._send_user_message(message)  # type: ignore[attr-defined]

    def open(self, argv: Sequence[str]) -> Stream:
        """Start `argv` and return its stdin and stdout as one file-like object."""
        return Stream(self, self.start(argv), argv[0])

    def unix_socket(self, path: str, *, root: str = "") -> Stream:
        """A connection to the Unix socket `path` in the guest; `root`: the directory whose programs are used."""
        return self.open([*(["chroot", root] if root else []), "socat", "-", f"UNIX-CONNECT:{path}"])

    def interact(self, argv: Sequence[str], *, tty: bool, first_output: Callable[[], None] | None = None) -> int:
        """Run `argv` with stdin, stdout and stderr of this process; returns its exit status.

        With `tty` it gets a terminal (raw mode, window size and its changes); without, Ctrl-C is
        passed on as SIGINT. `first_output` is called when the first of its output arrives. Raises
        ConnectionLost.
        """
        from hostos.machine.terminal import interact

        return interact(self, argv, tty=tty, first_output=first_output)


def has_ended(channel: paramiko.Channel) -> bool:
    """Whether nothing more will come. What has come may still have to be drained."""
    return channel.exit_status_ready() and bool(channel.eof_received or channel.closed)


def drain(channel: paramiko.Channel, out: bytearray, err: bytearray) -> bool:
    """Take what has arrived on both streams, without waiting; whether there was anything."""
    moved = False
    while channel.recv_ready():
        out += channel.recv(1 << 16)
        moved = True
    while channel.recv_stderr_ready():
        err += channel.recv_stderr(1 << 16)
        moved = True
    return moved


@dataclass(frozen=True)
class Terminal:
    """What a command's terminal is like: $TERM and its size in characters."""

    kind: str
    columns: int
    rows: int


class Stream:
    """stdin and stdout of a command in the guest, as a binary file; stderr is kept (its end)."""

    KEPT_STDERR = 65536

    def __init__(self, connection: Connection, channel: paramiko.Channel, what: str) -> None:
        self.channel = channel
        self._connection = connection
        self._what = what
        self._stderr = bytearray()
        self._reader = channel.makefile("rb", 1 << 16)
        # An undrained stderr would fill the window and stop stdout, too.
        self._drainer = threading.Thread(target=self._drain_stderr, daemon=True)
        self._drainer.start()

    def _drain_stderr(self) -> None:
        while True:
            try:
                data = self.channel.in_stderr_buffer.read(1 << 15)
            except OSError:
                return
            if not data:
                return
            self._stderr = (self._stderr + data)[-self.KEPT_STDERR :]

    def settimeout(self, seconds: float | None) -> None:
        """Reads and writes that take longer raise TimeoutError."""
        self.channel.settimeout(seconds)

    def read(self, size: int = -1) -> bytes:
        return bytes(self._reader.read(size if size >= 0 else None))

    def readline(self, size: int = -1) -> bytes:
        return bytes(self._reader.readline(size if size >= 0 else None))

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def write(self, data: bytes) -> int:
        self.channel.sendall(data)
        return len(data)

    def flush(self) -> None:
        """Writes are never buffered."""

    def fileno(self) -> int:
        """For select(): readable when there is something to read from the network (only meaningful
        while nothing read is still buffered)."""
        return self.channel.fileno()

    def close_write(self) -> None:
        """End of input for the command."""
        self.channel.shutdown_write()

    def stderr(self) -> bytes:
        """The end of what it has written to stderr so far."""
        return bytes(self._stderr)

    def status(self, timeout: float) -> int:
        """Wait for its end; raises TimeoutError, ConnectionLost."""
        if not self.channel.status_event.wait(timeout):
            raise TimeoutError(f"{self._what} did not end within {timeout:.0f} s")
        return self._connection.status(self.channel, self._what)

    def close(self) -> None:
        self.channel.close()
        self._drainer.join(1.0)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
