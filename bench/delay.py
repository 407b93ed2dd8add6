"""A TCP proxy that delays: `delay.py LISTEN-HOST:PORT TARGET-HOST:PORT MILLISECONDS` (each way).

Stands in for netem where the kernel has none. Every chunk is passed on that long after it came; a
connection is accepted at once, so only what is said over it sees the round trip.
"""

from __future__ import annotations

import asyncio
import socket
import sys

CHUNK = 65536
QUEUE = 4096
"""Chunks under way at most, so that a slow reader slows the writer down in the end."""


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUE)

    async def deliver() -> None:
        while True:
            due, data = await queue.get()
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()

    async with asyncio.TaskGroup() as group:
        group.create_task(deliver())
        while data := await reader.read(CHUNK):
            await queue.put((loop.time() + delay, data))
        await queue.put((loop.time() + delay, b""))


async def serve(listen: str, target: str, delay: float) -> None:
    """Until cancelled; prints `ready` once it listens. `delay`: seconds each way."""
    host, port = listen.rsplit(":", 1)
    target_host, target_port = target.rsplit(":", 1)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(target_host, int(target_port))
        except OSError:
            writer.close()
            return
        for end in (writer, back):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.gather(_copy(reader, back, delay), _copy(there, writer, delay))
        except* (OSError, RuntimeError):
            pass  # one side went away
        finally:
            for end in (writer, back):
                end.close()

    server = await asyncio.start_server(connected, host, int(port))
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2], float(sys.argv[3]) / 1000))
