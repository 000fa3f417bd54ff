"""Data frames of the streams are encoded and decoded here without protobuf's copies.

This file owns the fact that WriteChunksRequest, RetrieveResponse, FetchChunksResponse, KeepWindowRequest and
ReadWindowResponse are a oneof of `header` and `bytes data = 2`. The bytes on the wire are exactly those of protobuf,
and whatever other encoding of such a message arrives is left to protobuf. The service uses this file too.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

FRAME_BYTES = 1 << 20
_DATA = 0x12  # field 2, length-delimited
_LONGEST_PREFIX = 11


def encode(parts: Sequence[memoryview | bytes]) -> bytes:
    """Return the encoded data frame whose bytes are those of `parts`."""
    return b"".join((prefix(_DATA >> 3, sum(map(len, parts))), *parts))


class Frame:
    """A data frame that is filled where it is encoded, so that its bytes are copied once, into it.

    room: the place for its bytes, which counts no more after `encoded`.
    """

    def __init__(self, length: int) -> None:
        """Make a frame of `length` bytes of data, which is at least 1."""
        start = prefix(_DATA >> 3, length)
        # The bytes that this hands out at last are its own, without a copy of them.
        self._memory = BytesIO(start)
        self._memory.seek(len(start) + length - 1)
        self._memory.write(b"\0")
        self._whole = self._memory.getbuffer()
        self.room = self._whole[len(start) :]

    def encoded(self) -> bytes:
        """Return the encoded frame."""
        self.room.release()
        self._whole.release()
        return self._memory.getvalue()


def prefix(field: int, length: int) -> bytes:
    """Return the bytes that stand before a length-delimited field: its key and its length.

    field: its number, at most 15. length: of the message, the bytes or the text that it is.
    """
    written = bytearray((field << 3 | 2,))
    while length > 0x7F:
        written.append(length & 0x7F | 0x80)
        length >>= 7
    written.append(length)
    return bytes(written)


def serializer(message: Any) -> bytes:
    """Return the bytes of a message; a data frame is encoded already and is returned as it is."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def deserializer(kind: Any) -> Callable[[bytes], Any]:
    """Return the function that decodes a frame of a stream of messages `kind`.

    The function returns the data of a data frame as a view of the received bytes, and another frame as its message.
    Errors of the function: DecodeError.
    """

    def read(received: bytes) -> Any:
        if (view := data(received)) is not None:
            return view
        message = kind.FromString(received)
        return memoryview(message.data) if message.HasField("data") else message

    return read


def data(received: bytes) -> memoryview | None:
    """Return the data as a view of a received message; None where the message is not that field and nothing else."""
    if not received or received[0] != _DATA:
        return None
    length = shift = 0
    for at, byte in enumerate(received[1:_LONGEST_PREFIX], 2):
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return memoryview(received)[at:] if len(received) - at == length else None
    return None
