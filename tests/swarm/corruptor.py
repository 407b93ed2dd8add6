"""A peer that lies: `corruptor.py HOST:PORT GOOD-HOST:PORT SHARE`.

Passes connections on to a good seed and flips one byte in that share of the blocks it sends.
Plain BitTorrent over TCP: a handshake of 68 bytes, then messages of a 4-byte length, a type and a
payload; a piece message is type 7, with 8 bytes before the block (BEP 3).
"""

import asyncio
import random
import socket
import sys

HANDSHAKE, PIECE = 68, 7


async def spoil(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, share: float) -> None:
    writer.write(await reader.readexactly(HANDSHAKE))
    while True:
        length = await reader.readexactly(4)
        message = bytearray(await reader.readexactly(int.from_bytes(length, "big")))
        if message and message[0] == PIECE and random.random() < share:
            message[9 + random.randrange(len(message) - 9)] ^= 0xFF
        writer.write(length + message)
        await writer.drain()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def main() -> None:
    (host, port), (good_host, good_port) = (text.rsplit(":", 1) for text in sys.argv[1:3])
    share = float(sys.argv[3])

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            good_reader, good_writer = await asyncio.open_connection(good_host, int(good_port))
        except OSError:
            writer.close()
            return
        for end in (writer, good_writer):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tasks = [
            asyncio.create_task(copy(reader, good_writer)),
            asyncio.create_task(spoil(good_reader, writer, share)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in (writer, good_writer):
            end.close()

    server = await asyncio.start_server(connected, host, int(port))
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


asyncio.run(main())
