"""The ends of direct calls (direct.proto) in both clients: a call has a connection to the plain socket of a server on
this machine to itself, which is kept for the next call."""

import asyncio
import socket
import threading
import time
from contextlib import suppress

from kvbank._transport.same_host import SameHost
from kvbank.v1 import direct_pb2
from kvbank.wire import local_socket

# Connections of an asyncio client, which may have any number of calls under way: the server has a thread for each
# connection, and few of them for all its callers.
_MOST_OF_A_LOOP = 16


class _Connections:
    """The connections to the socket in a folder: those that are idle, and those in use. Threads may share them."""

    def __init__(self, folder: SameHost, most: int | None = None) -> None:
        """Begin without any connection. folder: is kept open, because the path of the socket leads there by it. most:
        how many there may be; None for any number."""
        self._folder, self._most = folder, most
        self.path = folder.folder.reached(folder.socket)
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._open: set[socket.socket] = set()
        self._closed = False

    def idle(self) -> socket.socket | None:
        """Take a connection that is idle; None where there is none."""
        with self._lock:
            return self._idle.pop() if self._idle else None

    def new(self) -> socket.socket:
        """Make a socket, which the caller connects. Errors: ConnectionError where there may be no more."""
        with self._lock:
            if self._closed:
                raise ConnectionError("this end is closed")
            if len(self._open) == self._most:
                raise ConnectionError("all connections are in use")
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._open.add(made)
        return made

    def keep(self, connection: socket.socket) -> None:
        """Give back a connection, for the next call."""
        with self._lock:
            kept = not self._closed
            if kept:
                self._idle.append(connection)
        if not kept:
            self.drop(connection)

    def drop(self, connection: socket.socket) -> None:
        """Close a connection that was taken or made."""
        with self._lock:
            self._open.discard(connection)
            connection.close()

    def close(self) -> None:
        """End every connection, so that calls under way fail."""
        with self._lock:
            self._closed = True
            # The call that uses a connection closes it: here its number could become another file's before that call
            # has noticed.
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            idle, self._idle = self._idle, []
        for connection in idle:
            self.drop(connection)

    def __del__(self) -> None:
        """Close the connections, which no call uses any more. A shutdown would end those of a forked parent, too."""
        for connection in self._open:
            connection.close()


class Direct:
    """The end of the blocking client. Threads may share it."""

    def __init__(self, folder: SameHost) -> None:
        """Connect with the first call to the socket in a folder."""
        self._connections = _Connections(folder)

    def call(self, request: direct_pb2.DirectRequest, timeout: float) -> direct_pb2.DirectResponse:
        """Ask once, and return the answer; where the server of a kept connection has gone since, ask over a new one.

        timeout: seconds. Errors: TimeoutError, other OSErrors, DecodeError.
        """
        message, until = request.SerializeToString(), time.monotonic() + timeout
        while (connection := self._connections.idle()) is not None:
            with suppress(ConnectionError):
                return self._asked(connection, message, until)
        return self._asked(self._connected(until), message, until)

    def _asked(self, connection: socket.socket, message: bytes, until: float) -> direct_pb2.DirectResponse:
        try:
            connection.settimeout(max(until - time.monotonic(), 0.001))
            local_socket.send(connection, message)
            response = _read(local_socket.receive(connection, until=until))
        except BaseException:  # the next call on it would read the answer to this one
            self._connections.drop(connection)
            raise
        self._connections.keep(connection)
        return response

    def _connected(self, until: float) -> socket.socket:
        connection = self._connections.new()
        try:
            connection.settimeout(max(until - time.monotonic(), 0.001))
            connection.connect(self._connections.path)
            _check(connection)
        except BaseException:
            self._connections.drop(connection)
            raise
        return connection

    def close(self) -> None:
        """End every connection, so that calls under way fail."""
        self._connections.close()


class AsyncDirect:
    """The end of the asyncio client. Tasks of one event loop may share it."""

    def __init__(self, folder: SameHost) -> None:
        """Connect with the first call, as `Direct` does."""
        self._connections = _Connections(folder, _MOST_OF_A_LOOP)

    async def call(self, request: direct_pb2.DirectRequest, timeout: float) -> direct_pb2.DirectResponse:
        """Ask once, and return the answer; see `Direct.call`."""
        message = request.SerializeToString()
        async with asyncio.timeout(timeout):
            while (connection := self._connections.idle()) is not None:
                with suppress(ConnectionError):
                    return await self._asked(connection, message)
            return await self._asked(await self._connected(), message)

    async def _asked(self, connection: socket.socket, message: bytes) -> direct_pb2.DirectResponse:
        loop, incoming = asyncio.get_running_loop(), local_socket.Incoming()
        try:
            await loop.sock_sendall(connection, local_socket.framed(message))
            while incoming.wanted:
                incoming.take(await loop.sock_recv(connection, incoming.wanted))
            response = _read(incoming.message)
        except BaseException:
            self._connections.drop(connection)
            raise
        self._connections.keep(connection)
        return response

    async def _connected(self) -> socket.socket:
        connection = self._connections.new()
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, self._connections.path)
            _check(connection)
        except BaseException:
            self._connections.drop(connection)
            raise
        return connection

    def close(self) -> None:
        """End every connection, so that calls under way fail."""
        self._connections.close()


def _read(message: bytes | None) -> direct_pb2.DirectResponse:
    """Read an answer out of its bytes. Errors: ConnectionError where there is none, DecodeError."""
    if message is None:
        raise ConnectionError("the server has closed the connection")
    return direct_pb2.DirectResponse.FromString(message)


def _check(connection: socket.socket) -> None:
    """Check that a process of this user answers. Errors: ConnectionError."""
    if not local_socket.same_user(connection):
        raise ConnectionError("another user answers")
