"""The port of the HTTP door: connections are taken here, over TLS where the service has a certificate.

They are served in the event loop, so that slow callers cost no thread. This file owns the bounds on how many
connections there are, of all hosts and of one, and how long each may take, its handshake included.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable

from memory_service.access import peers
from memory_service.api.tls.serving import Tls
from memory_service.domain.errors import StartError

# Connections at a time, and those of one host, which leaves room for others whatever it does.
MOST_CONNECTIONS, MOST_OF_HOST = 64, 16
# Bytes of the head of a request.
LONGEST_HEAD = 8 * 1024
# Seconds before the next try, where the system has no descriptor for a connection.
_PAUSE_S = 0.5
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class HttpPort:
    """Takes connections from `listen` to `close`, in the event loop of `listen`."""

    def __init__(self, serve: Serve, patience: float, tls: Tls | None = None) -> None:
        """Keep by what connections will be served.

        serve: serves a connection to its end. patience: seconds that a connection may take. tls: by what TLS is spoken.
        """
        self._serve, self._patience, self._tls = serve, patience, tls
        # Connections that are served, and the host of each.
        self._connections: dict[asyncio.Task[None], str] = {}
        self._listener: socket.socket | None = None
        self._taking: asyncio.Task[None] | None = None

    async def listen(self, listen: str) -> str:
        """Listen at HOST:PORT, and return that with the port that the system gave where PORT is 0. Errors:
        StartError."""
        host, _, port = listen.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, *_, place = found[0]
            self._listener = socket.create_server(place[:2], family=family)
        except OSError as error:
            raise StartError(f"cannot listen on {listen}: {error.strerror}") from error
        self._listener.setblocking(False)
        self._taking = asyncio.create_task(self._take(self._listener))
        return f"{host}:{self._listener.getsockname()[1]}"

    async def close(self) -> None:
        """End all connections, and listen no more."""
        tasks = [*self._connections, *([self._taking] if self._taking else ())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    async def _take(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(_PAUSE_S)
                continue
            host = peers.host(peers.named(address))
            if len(self._connections) >= MOST_CONNECTIONS or self._of(host) >= MOST_OF_HOST:
                connection.close()
                continue
            task = asyncio.create_task(self._connected(connection))
            self._connections[task] = host
            task.add_done_callback(self._connections.pop)

    def _of(self, host: str) -> int:
        """Count the connections of a host."""
        return sum(each == host for each in self._connections.values())

    async def _connected(self, connection: socket.socket) -> None:
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(self._patience):
                reader, writer = await self._opened(connection)
                await self._serve(reader, writer)
        except (TimeoutError, OSError, EOFError):
            pass  # the caller has gone, was too slow, or speaks no TLS
        finally:
            if writer is not None:
                writer.transport.abort()
            else:
                connection.close()

    async def _opened(self, connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the streams of a connection, over TLS when its handshake is done."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(LONGEST_HEAD)
        protocol = asyncio.StreamReaderProtocol(reader)
        # The context of this moment: a renewed certificate is served from the next connection on.
        context = None if self._tls is None else await asyncio.to_thread(self._tls.for_http)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=context)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
