"""A dumb round-robin in front of servers: each connection goes to the next of them, byte by byte."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle
from typing import Any


@contextmanager
def round_robin(ports: Sequence[int]) -> Iterator[int]:
    """Yield the port of a round-robin in front of ports of this machine."""
    turns, started, found = cycle(ports), threading.Event(), list[Any]()
    running = set[Any]()  # asyncio itself keeps no hold of them

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(task := asyncio.current_task())
        behind, to_server = await asyncio.open_connection("127.0.0.1", next(turns))
        try:
            await asyncio.gather(_copied(reader, to_server), _copied(behind, writer))
        finally:
            writer.transport.abort()
            to_server.transport.abort()
            running.discard(task)

    async def serve() -> None:
        over = asyncio.Event()
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        found.extend((asyncio.get_running_loop(), over, server.sockets[0].getsockname()[1]))
        started.set()
        await over.wait()
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(30)
    loop, over, port = found
    yield port
    loop.call_soon_threadsafe(over.set)
    thread.join(30)


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with suppress(OSError, RuntimeError):
        writer.write_eof()
