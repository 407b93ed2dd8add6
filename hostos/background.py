"""A background process of hostos: started once, asked over a Unix socket, stopped surely.

Whether it runs is never written down: it runs if it holds its lock, which the kernel drops with it,
and it is well if it answers. It speaks JSON lines over its socket, one request, one answer:
`{"schema": 1, "op": "status"}` and the like.

`Place` and the functions on it are for whoever starts and asks; `hold`, `detach` and `Control` are for
the process itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from hostos.errors import UserError, failure
from hostos.locking import exclusive

START_DEADLINE = 20.0
"""Seconds until a new process must be ready and answer."""
STOP_DEADLINE = 10.0
ANSWER_DEADLINE = 10.0
DYING_DEADLINE = 2.0
"""Seconds that a killed process may take to let go of its lock."""
MAX_LOG = 1 << 20
"""A log longer than this (bytes) is set aside when the process is started."""
MAX_REQUEST = 4096
SCHEMA = 1


@dataclass(frozen=True)
class Place:
    """Files of a background process: `directory` for its state, `socket` for control.

    `noun` is what it is called, and by which its command starts: `hostos NOUN start`.
    """

    directory: Path
    socket: Path
    noun: str

    @property
    def running(self) -> Path:
        """Locked as long as the process lives."""
        return self.directory / "running.lock"

    @property
    def starting(self) -> Path:
        """Locked by whoever starts or stops it."""
        return self.directory / "starting.lock"

    @property
    def info(self) -> Path:
        """Process id and start time, for a process that doesn't answer."""
        return self.directory / f"{self.noun}.json"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.noun}.log"


@contextmanager
def changing(place: Place) -> Iterator[None]:
    """Hold the place alone while it is started or stopped. Raises a failure if others take too long."""
    why = f"another hostos is starting or stopping the {place.noun}"
    with exclusive(place.starting, START_DEADLINE + STOP_DEADLINE, why):
        yield


def spawn(place: Place, command: Sequence[str], *, hint: str) -> None:
    """Run `command`, which must `detach`; returns when it is ready, with its output in the log.

    To be called while `changing`. What it says as `error: …` before it ends becomes a UserError with
    `hint`; anything else that goes wrong is a failure.
    """
    if not wait_unlocked(place, DYING_DEADLINE):
        raise failure(
            f"a {place.noun} runs but doesn't answer",
            f"hostos {place.noun} stop, then start it again; its log: {place.log}",
        )
    if place.log.exists() and place.log.stat().st_size > MAX_LOG:
        place.log.replace(place.log.with_suffix(".log.1"))
    with place.log.open("ab") as log:
        began = log.tell()
        try:
            # Ends when the process is ready, which then is nobody's child (see detach).
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", timeout=START_DEADLINE
            ).returncode
        except subprocess.TimeoutExpired:
            raise failure(
                f"the {place.noun} was not ready within {START_DEADLINE:.0f} s", f"look at {place.log}"
            ) from None
    if code != 0 or request(place, "status") is None:
        raise _early_exit(place, began, code, hint)


def _early_exit(place: Place, began: int, code: int, hint: str) -> UserError:
    with place.log.open("rb") as log:
        log.seek(began)
        lines = log.read().decode(errors="replace").strip().splitlines()
    for line in lines:
        _, found, reason = line.partition(" error: ")
        if found:
            return UserError(reason, hint)
    return failure(
        f"the {place.noun} ended with status {code}: {lines[-1] if lines else 'it said nothing'}",
        f"look at {place.log}",
    )


def vanished(place: Place) -> UserError:
    """What to raise for a process that was ready a moment ago and doesn't answer now."""
    return failure(f"the {place.noun} started and ended at once", f"look at {place.log}")


def request(place: Place, operation: str, **fields: Any) -> dict[str, Any] | None:
    """Ask the process; None if none answers. Raises a failure for an answer that isn't one."""
    data = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(ANSWER_DEADLINE)
        try:
            client.connect(str(place.socket))
            client.sendall(json.dumps({"schema": SCHEMA, "op": operation, **fields}).encode() + b"\n")
            while not data.endswith(b"\n"):
                if not (more := client.recv(1 << 16)):
                    return None
                data += more
        except OSError:
            return None
    answer = json.loads(data)
    if not answer.get("ok"):
        raise failure(f"the {place.noun}: {answer.get('error')}", f"hostos {place.noun} stop, then start it again")
    return dict(answer)


def stop(place: Place) -> bool:
    """Stop the process, kindly, then firmly; returns whether there was one. Raises a failure if it
    can't be stopped."""
    if not place.directory.is_dir():
        return False
    with changing(place):
        if not locked(place.running):
            place.socket.unlink(missing_ok=True)
            place.info.unlink(missing_ok=True)
            return False
        process = _process(place)
        request(place, "stop")
        for action in (None, psutil.Process.terminate, psutil.Process.kill):
            if action is not None and process is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    action(process)
            deadline = time.monotonic() + STOP_DEADLINE / 2
            while time.monotonic() < deadline:
                if not locked(place.running) and _gone(process):
                    return True
                time.sleep(0.02)
    raise failure(f"the {place.noun} can't be stopped", f"it holds {place.running}: fuser {place.running}")


def _process(place: Place) -> psutil.Process | None:
    """The process, if the one with its number is still the same."""
    try:
        info = json.loads(place.info.read_text())
        process = psutil.Process(info["pid"])
        return process if abs(process.create_time() - info["started"]) < 0.1 else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def wait_unlocked(place: Place, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while locked(place.running):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _gone(process: psutil.Process | None) -> bool:
    try:
        return process is None or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def locked(path: Path) -> bool:
    """Does some process hold the lock file?"""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


# --- the process itself ---


def detach() -> Callable[[], None]:
    """Go on in a process of its own; what this returns tells the first one to end, which until then
    waits, so that whoever started it knows.

    If the first one has been killed meanwhile, nobody wants this process any more: then telling it
    raises BrokenPipeError, and the process ends.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child:
        os.close(send)
        if os.read(receive, 1):
            os._exit(0)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.close(receive)
    os.setsid()

    def tell() -> None:
        os.write(send, b"+")
        os.close(send)

    return tell


@contextmanager
def hold(place: Place) -> Iterator[bool]:
    """Hold the place's lock as the one process of its kind; gives False if another one does."""
    with place.running.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write_info(place: Place) -> None:
    """Say who this is, for `stop`."""
    me = {"schema": SCHEMA, "pid": os.getpid(), "started": psutil.Process().create_time()}
    place.info.write_text(json.dumps(me) + "\n")


def log(text: str) -> None:
    """One line of the log, with the time."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


Answer = Callable[[str, dict[str, Any]], dict[str, Any]]


class Control:
    """The control socket: each request's operation and fields go to `answer`, which raises UserError
    or ValueError for one that it can't take."""

    def __init__(self, place: Place, answer: Answer) -> None:
        self.place = place
        self._answer = answer

    async def open(self) -> asyncio.Server:
        self.place.socket.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._serve, str(self.place.socket), limit=MAX_REQUEST)
        self.place.socket.chmod(0o600)
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10):
                answer = self.answer(await reader.readline())
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, ValueError, OSError):
            pass  # the client's fault: it said nothing, too much, or has gone
        finally:
            writer.close()

    def answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            operation = request["op"]
            if request.get("schema", SCHEMA) != SCHEMA:
                return _refused(f"this {self.place.noun} speaks schema {SCHEMA}")
        except (ValueError, KeyError, TypeError, AttributeError):
            return _refused("not a request")
        try:
            return {"schema": SCHEMA, "ok": True, **self._answer(operation, request)}
        except (UserError, ValueError) as error:
            return _refused(str(error))


def _refused(reason: str) -> dict[str, Any]:
    return {"schema": SCHEMA, "ok": False, "error": reason}


CRASHES = 5
CRASHES_WITHIN_S = 60.0


def supervise(work: Callable[[Callable[[], None]], int], ready: Callable[[], None]) -> int:
    """Run `work` in a process of its own and again should it die; returns its exit status when it ends
    by itself. `work` gets what it has to call when it is ready.

    It is given up after it died `CRASHES` times within a minute, or before it was ready once. SIGTERM
    and SIGINT are passed on.
    """
    deaths: list[float] = []
    first = True
    while True:
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            _die_with_parent()
            status = 1
            try:
                status = work(partial(_tell, send))
            except BaseException as error:
                log(f"{type(error).__name__}: {error}")
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(send)

        def pass_on(number: int, _: object, child: int = child) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, pass_on)
        if os.read(receive, 1) and first:
            first = False
            ready()
        os.close(receive)
        _, code = os.waitpid(child, 0)
        status = os.waitstatus_to_exitcode(code)
        if status in (0, 2) or first:
            return status & 0xFF
        now = time.monotonic()
        deaths = [*(death for death in deaths if now - death < CRASHES_WITHIN_S), now]
        if len(deaths) >= CRASHES:
            log(f"died {len(deaths)} times within {CRASHES_WITHIN_S:.0f} s: given up")
            return 1
        log(f"died with status {status}: started again")
        time.sleep(0.2 * len(deaths))


def _tell(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.write(descriptor, b"+")


def _die_with_parent() -> None:
    """On Linux: a worker whose supervisor was killed ends, too (prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
