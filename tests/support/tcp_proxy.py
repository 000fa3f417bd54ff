"""A proxy of connections, byte by byte: each goes to the next of some servers, and can be cut."""

import asyncio
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class TcpProxy:
    """Stands on a port of this machine before ports of it, or before unix sockets, as a context manager."""

    def __init__(self, *upstreams: int | str) -> None:
        """Listen on a free port. upstreams: ports of this machine, or paths of sockets."""
        self._turns = cycle(upstreams)
        # Both ends of each connection.
        self._ends: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._running = set[Any]()  # asyncio itself keeps no hold of them
        self._over = asyncio.Event()
        started = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(started),))
        self._thread.start()
        assert started.wait(60)

    def cut(self, choose: random.Random, share: float) -> int:
        """Reset a share of the connections, at both ends; return how many there were."""

        def reset() -> int:
            ends = [pair for pair in self._ends if choose.random() < share]
            for writer in (writer for pair in ends for writer in pair):
                writer.transport.abort()
            return len(ends)

        return self._called(reset)

    def close(self) -> None:
        """Take no more connections; those that are open end when one of their ends closes them."""
        self._called(self._over.set)
        self._thread.join(60)

    def _called(self, call: Callable[[], T]) -> T:
        async def calling() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(calling(), self._loop).result(60)

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port: int = server.sockets[0].getsockname()[1]
        started.set()
        await self._over.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._running.add(task := asyncio.current_task())
        ends = None
        try:
            behind, to_server = await _open(next(self._turns))
            self._ends.append(ends := (writer, to_server))
            await asyncio.gather(_copied(reader, to_server), _copied(behind, writer))
        except OSError:
            pass  # nothing listens there; the caller's connection is reset
        except asyncio.CancelledError:
            pass  # at the end; asyncio's callback of a connection would log it
        finally:
            writer.transport.abort()
            if ends is not None:
                ends[1].transport.abort()
                self._ends.remove(ends)
            self._running.discard(task)

    def __enter__(self) -> "TcpProxy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _open(upstream: int | str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if isinstance(upstream, str):
        return await asyncio.open_unix_connection(upstream)
    return await asyncio.open_connection("127.0.0.1", upstream)


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with suppress(OSError, RuntimeError):
        writer.write_eof()
