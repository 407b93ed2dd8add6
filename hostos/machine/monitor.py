"""QEMU's monitor (QMP), synchronously.

qemu.qmp is asyncio inside and falls silent when QEMU dies, so every wait here also watches the
process. Its event loop has a thread of its own: a Ctrl-C hits the thread that waits and never the
middle of the protocol. QEMU serves one monitor client at a time: keep connections short.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import ConnectError, EventListener, QMPClient, QMPError

from hostos.machine import interrupts

T = TypeVar("T")
_POLL = 0.05
# Seconds for a polite end of the connection.
_HANG_UP = 2.0
_OURS = "hostos"

# It logs disconnections as errors; what matters is raised.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class MonitorError(Exception):
    """The monitor did not do what was asked; the message says why."""


class QemuGone(MonitorError):  # noqa: N818
    """QEMU ended meanwhile."""


class Monitor:
    """A connection to a QEMU's monitor. Use `connect`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, client: QMPClient, alive: Callable[[], bool]) -> None:
        self._loop = loop
        self._client = client
        self._alive = alive
        self._events = EventListener()
        client.register_listener(self._events)

    def execute(self, command: str, arguments: dict[str, object] | None = None, timeout: float = 5.0) -> Any:
        """Run a QMP command and return its answer; raises MonitorError."""
        return self._run(lambda: self._client.execute(command, arguments), timeout, command)

    def wait_event(self, names: Collection[str], timeout: float) -> dict[str, Any] | None:
        """The next event called one of `names`, None after `timeout` seconds; raises QemuGone."""

        async def wait() -> dict[str, Any]:
            while True:
                event = await self._events.get()
                if event["event"] in names:
                    return dict(event)

        try:
            return self._run(wait, timeout, "event")
        except _Late:
            return None

    def _run(self, make: Callable[[], Coroutine[Any, Any, T]], timeout: float, what: str) -> T:
        return _wait(self._loop, lambda: _guarded(make(), timeout, self._alive, what))


class _Late(MonitorError):  # noqa: N818
    pass


@contextlib.contextmanager
def connect(path: Path, alive: Callable[[], bool], *, timeout: float) -> Iterator[Monitor]:
    """Connect to the monitor socket `path`, waiting up to `timeout` seconds for it to appear.

    `alive` says whether QEMU still runs. Raises MonitorError, QemuGone.
    """
    leave = threading.Event()
    gone = threading.Event()
    serving: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = concurrent.futures.Future()
    clients: list[QMPClient] = []

    async def serve() -> None:
        finished = asyncio.Event()
        serving.set_result((asyncio.get_running_loop(), finished))
        if not leave.is_set():
            await finished.wait()
        # What is half done first: qemu.qmp cannot disconnect while it connects.
        await _cancel(task for task in asyncio.all_tasks() if task.get_name() == _OURS)
        for client in clients:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.disconnect(), _HANG_UP)
        await _cancel(asyncio.all_tasks())

    def run() -> None:
        asyncio.run(serve())
        gone.set()

    async def dial(loop: asyncio.AbstractEventLoop) -> Monitor:
        # Made in this thread: making one logs, and an interrupt while the other thread held the lock
        # of `logging` would leave it locked for ever.
        client = QMPClient("hostos")
        clients.append(client)
        while True:
            try:
                await client.connect(os.fspath(path))
            except ConnectError:
                # Not there yet, busy with another client, or on its way out: the deadline and
                # the watch over the process decide.
                await asyncio.sleep(_POLL)
            else:
                return Monitor(loop, client, alive)

    def hang_up() -> None:
        leave.set()
        if serving.done():
            loop, finished = serving.result()
            with contextlib.suppress(RuntimeError):  # closed already
                loop.call_soon_threadsafe(finished.set)
            gone.wait(2 * _HANG_UP)

    try:
        with interrupts.held():
            threading.Thread(target=run, daemon=True).start()
            loop, _ = serving.result()
        yield _wait(loop, lambda: _guarded(dial(loop), timeout, alive, "connect"))
    finally:
        try:
            with interrupts.held():
                hang_up()
        except KeyboardInterrupt:
            # Perhaps before it was held back.
            with interrupts.held():
                hang_up()
            raise


def _wait(loop: asyncio.AbstractEventLoop, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run what `make` gives, which has a deadline of its own, in the thread of `loop`.

    Made there, not here: an interrupt must not leave a coroutine that nobody awaits. What it
    leaves running is cancelled when the connection ends.
    """
    done = threading.Event()
    answer: list[T] = []
    fault: list[BaseException] = []

    async def work() -> None:
        try:
            answer.append(await make())
        except BaseException as error:
            fault.append(error)
        finally:
            done.set()

    tasks: list[asyncio.Task[None]] = []
    with interrupts.held() as interrupted:
        loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(work(), name=_OURS)))
        while not done.wait(_POLL) and not interrupted():
            pass
    if fault:
        raise fault[0]
    return answer[0]


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    others = [task for task in tasks if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _guarded(work: Coroutine[Any, Any, T], timeout: float, alive: Callable[[], bool], what: str) -> T:
    task = asyncio.ensure_future(work)
    give_up = asyncio.get_running_loop().time() + timeout
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_POLL)
            if not task.done() and not alive():
                raise QemuGone(f"QEMU ended during {what}")
            if not task.done() and asyncio.get_running_loop().time() > give_up:
                raise _Late(f"no answer to {what} within {timeout:.0f} s")
        return task.result()
    except (QMPError, OSError, EOFError) as error:
        raise (MonitorError if alive() else QemuGone)(f"{what}: {error}") from error
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, QMPError, OSError, EOFError):
                await task
