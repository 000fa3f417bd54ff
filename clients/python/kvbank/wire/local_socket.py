"""Direct calls are the same-host calls over a plain unix socket, as direct.proto has them.

This file owns the form of a message on that socket; the service uses it too.
"""

import os
import socket
import struct
import time

LARGEST_MESSAGE = 64 << 20
_HEAD = 4  # the bytes of the length before each message
_ROOM = 64 << 10  # most messages come whole in one piece
_CREDENTIALS = struct.Struct("3i")


def framed(message: bytes) -> bytes:
    """Return a message as it goes over a connection."""
    return len(message).to_bytes(_HEAD, "little") + message


class Incoming:
    """The next message of a connection, which comes in pieces.

    wanted: the bytes to receive next, at most; 0 where nothing more is to come.
    message: None where the connection has ended in its place, or the message is not whole yet.
    """

    def __init__(self, most: int = LARGEST_MESSAGE) -> None:
        """Begin before its first piece. most: the bytes that the message may have."""
        self._most = most
        self._data = bytearray()
        self.wanted = _ROOM
        self.message: bytes | None = None

    def take(self, piece: bytes) -> None:
        """Take what was received, which is nothing where the connection has ended. Errors: ConnectionError for a
        message that is cut or too long."""
        data = self._data
        data += piece
        if not piece and data:
            raise ConnectionError("the connection ended within a message")
        end = _HEAD + int.from_bytes(data[:_HEAD], "little") if len(data) >= _HEAD else _HEAD + 1
        if end > _HEAD + self._most or len(data) > end:
            raise ConnectionError(f"a message of {end - _HEAD} bytes is over {self._most}, or more than it came")
        self.wanted = min(end - len(data), 1 << 20) if piece else 0
        if len(data) == end:
            self.message = bytes(memoryview(data)[_HEAD:])


def send(connection: socket.socket, message: bytes) -> None:
    """Write one message to a connection. Errors: OSError."""
    connection.sendall(framed(message))


def receive(connection: socket.socket, most: int = LARGEST_MESSAGE, until: float | None = None) -> bytes | None:
    """Read the next message; None where the connection ended instead.

    Errors: OSError for a message that is cut or too long, TimeoutError where it is not whole at the time `until`
    (monotonic).
    """
    incoming = Incoming(most)
    while incoming.wanted:
        _wait_until(connection, until)
        incoming.take(connection.recv(incoming.wanted))
    return incoming.message


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
