"""The port of a worker: connections are taken here, over TLS where the worker has a certificate.

This file owns how many connections there are at a time, of one host and of all hosts, those in a handshake included: so
that one host, whatever it does, leaves room for others.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any

import h11

from model_worker.http.connection import Connection, last_answer
from model_worker.http.errors import ApiError
from model_worker.http.metrics import Refusal

# Connections that wait to be taken.
_BACKLOG = 1024
# Seconds before the next try, where the system has no descriptor for a connection.
_PAUSE_S = 0.5
# So many times the connections of one host are those of all hosts.
_HOSTS = 2


class Port:
    """Takes connections of `listening` until it is closed. Made in a running event loop.

    make: makes what serves a connection. of_host: connections that one host may have at a time; all hosts together have
    twice as many. patience: seconds for the handshake of TLS, and for a caller who takes nothing of what is sent. tls:
    by which TLS is spoken, or None. refused: told of each connection that is one too many.
    """

    def __init__(
        self,
        listening: socket.socket,
        make: Callable[[], Connection],
        *,
        of_host: int,
        patience: float,
        tls: ssl.SSLContext | None = None,
        refused: Callable[[Refusal], object],
    ) -> None:
        self._listening, self._make, self._of_host = listening, make, of_host
        self._refused = refused
        self._patience = patience
        self._tls: dict[str, Any] = {}
        if tls is not None:
            self._tls = {"ssl": tls, "ssl_handshake_timeout": patience, "ssl_shutdown_timeout": patience}
        # Connections that are served, and the host of each.
        self._connections: dict[asyncio.Task[None], str] = {}
        listening.setblocking(False)
        listening.listen(_BACKLOG)
        self._taking = asyncio.create_task(self._take())

    def close(self) -> None:
        """Take no more connections; those that there are go on."""
        self._taking.cancel()

    async def _take(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listening)
            except OSError:
                await asyncio.sleep(_PAUSE_S)
                continue
            host = host_of(address[0])
            if self._count(host) >= self._of_host:
                self._refuse(connection, "host")
            elif len(self._connections) >= _HOSTS * self._of_host:
                self._refuse(connection, "all")
            else:
                task = asyncio.create_task(self._served(connection))
                self._connections[task] = host
                task.add_done_callback(self._connections.pop)
            await asyncio.sleep(0)  # a flood of connections leaves the loop to others

    def _count(self, host: str) -> int:
        """Return how many connections a host has."""
        return sum(each == host for each in self._connections.values())

    def _refuse(self, connection: socket.socket, why: Refusal) -> None:
        """End a connection at once; over plain HTTP with the reason, as far as that can be sent without waiting."""
        self._refused(why)
        with connection, suppress(OSError):
            connection.setblocking(False)
            if not self._tls:
                connection.send(_TOO_MANY)
                connection.shutdown(socket.SHUT_WR)

    async def _served(self, connection: socket.socket) -> None:
        """Serve a connection to its end."""
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux: the system ends what its caller takes nothing of
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * self._patience))
        serving = self._make()
        with suppress(OSError):  # the caller has gone, was too slow, or speaks no TLS
            await asyncio.get_running_loop().connect_accepted_socket(lambda: serving, connection, **self._tls)
            await serving.gone.wait()


def host_of(address: str) -> str:
    """Return what counts as one host: its address, or the network of 64 bits that a host of IPv6 has to itself."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        return str(found.ipv4_mapped or ip_network((found, 64), strict=False))
    return str(found)


_TOO_MANY = last_answer(
    ApiError(
        503,
        "too many connections: ask again soon, or over one that you have",
        "server_error",
        code="too_many_connections",
        retry_after=1.0,
    ),
    h11.Connection(h11.SERVER),
)
