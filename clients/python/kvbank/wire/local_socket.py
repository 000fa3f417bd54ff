"""Direct calls are the same-host calls over a plain unix socket, as direct.proto has them.

This file owns the form of a message on that socket; the service uses it too.
"""

import os
import socket
import struct
import threading
import time
from contextlib import suppress

from kvbank.v1 import direct_pb2

LARGEST_MESSAGE = 64 << 20
_ROOM = 64 << 10  # most messages come whole in one piece
_CREDENTIALS = struct.Struct("3i")


def send(connection: socket.socket, message: bytes) -> None:
    """Write one message to a connection. Errors: OSError."""
    connection.sendall(len(message).to_bytes(4, "little") + message)


def receive(connection: socket.socket, most: int = LARGEST_MESSAGE, until: float | None = None) -> bytes | None:
    """Read the next message; None where the connection ended instead.

    Errors: OSError for a message that is cut or too long, TimeoutError where it is not whole at the time `until`
    (monotonic).
    """
    _wait_until(connection, until)
    data = bytearray(connection.recv(_ROOM))
    if not data:
        return None
    _fill(connection, data, 4, until)
    length = int.from_bytes(data[:4], "little")
    if length > most or len(data) > 4 + length:
        raise ConnectionError(f"a message of {length} bytes is over {most}, or more than it came")
    _fill(connection, data, 4 + length, until)
    return bytes(memoryview(data)[4:])


def _fill(connection: socket.socket, data: bytearray, length: int, until: float | None) -> None:
    while len(data) < length:
        _wait_until(connection, until)
        more = connection.recv(min(length - len(data), 1 << 20))
        if not more:
            raise ConnectionError("the connection ended within a message")
        data += more


def _wait_until(connection: socket.socket, until: float | None) -> None:
    """Set the time that the next piece may take, so that all pieces together end before `until`. Errors:
    TimeoutError."""
    if until is not None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)


def same_user(connection: socket.socket) -> bool:
    """Tell whether a process of this user is at the other end."""
    if not hasattr(socket, "SO_PEERCRED"):  # not Linux
        return False
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(found)[1] == os.geteuid())


class Direct:
    """The client's end of direct calls. Connections carry one call at a time and are kept for the next; threads may
    share an object."""

    def __init__(self, path: str, needed: object = None) -> None:
        """Connect with the first call to the socket at `path`. needed: an object without which the path leads nowhere,
        such as an open folder; it is kept alive."""
        self._path = path
        self._needed = needed
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._open: set[socket.socket] = set()
        self._closed = False

    def call(self, request: direct_pb2.DirectRequest, timeout: float) -> direct_pb2.DirectResponse:
        """Ask once, and return the answer; where the server of a kept connection has gone since, ask over a new one.

        timeout: seconds. Errors: TimeoutError, other OSErrors.
        """
        message, until = request.SerializeToString(), time.monotonic() + timeout
        while (connection := self._idle_one()) is not None:
            with suppress(ConnectionError):
                return self._ask(connection, message, until)
        return self._ask(self._connected(until), message, until)

    def _ask(self, connection: socket.socket, message: bytes, until: float) -> direct_pb2.DirectResponse:
        try:
            connection.settimeout(max(until - time.monotonic(), 0.001))
            send(connection, message)
            answer = receive(connection, until=until)
            if answer is None:
                raise ConnectionError("the server has closed the connection")
            response = direct_pb2.DirectResponse.FromString(answer)
        except BaseException:  # the next call on it would read the answer to this one
            self._drop(connection)
            raise
        with self._lock:
            kept = not self._closed
            if kept:
                self._idle.append(connection)
        if not kept:
            self._drop(connection)
        return response

    def _idle_one(self) -> socket.socket | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _connected(self, until: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with self._lock:
            if self._closed:
                connection.close()
                raise ConnectionError("this end is closed")
            self._open.add(connection)
        try:
            connection.settimeout(max(until - time.monotonic(), 0.001))
            connection.connect(self._path)
            if not same_user(connection):
                raise ConnectionError("another user answers")
        except BaseException:
            self._drop(connection)
            raise
        return connection

    def _drop(self, connection: socket.socket) -> None:
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
            self._drop(connection)

    def __del__(self) -> None:
        """Close the connections, which no call uses any more. A shutdown would end those of a forked parent, too."""
        for connection in self._open:
            connection.close()
