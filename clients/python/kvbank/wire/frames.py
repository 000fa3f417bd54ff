"""The wire form of the three streams: their data frames, made and read without protobuf's copies.

This file owns the fact that WriteChunksRequest, RetrieveResponse and FetchChunksResponse are a oneof of `header` and
`bytes data = 2`. The bytes on the wire are exactly those of protobuf, and whatever other encoding of such a message
arrives is left to protobuf. The service uses this file too.
"""

from collections.abc import Callable, Sequence
from typing import Any

FRAME_BYTES = 1 << 20
_DATA = 0x12  # field 2, length-delimited
_LONGEST_PREFIX = 11


def encode(parts: Sequence[memoryview | bytes]) -> bytes:
    """The data frame whose bytes are those of `parts`, as it goes over the wire."""
    return b"".join((prefix(_DATA >> 3, sum(map(len, parts))), *parts))


def prefix(field: int, length: int) -> bytes:
    """What stands before a field (its number at most 15) of so many bytes: of a message, of bytes, of a text."""
    written = bytearray((field << 3 | 2,))
    while length > 0x7F:
        written.append(length & 0x7F | 0x80)
        length >>= 7
    written.append(length)
    return bytes(written)


def serializer(message: Any) -> bytes:
    """For a stream of messages, and of data frames that are encoded already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def deserializer(kind: Any) -> Callable[[bytes], Any]:
    """For a stream of `kind`: the data of a data frame as a view of the received bytes, other messages as they are."""

    def read(received: bytes) -> Any:
        if (view := data(received)) is not None:
            return view
        message = kind.FromString(received)
        return memoryview(message.data) if message.WhichOneof("frame") == "data" else message

    return read


def data(received: bytes) -> memoryview | None:
    """The data as a view of a received message, where the message is that field and nothing else."""
    if not received or received[0] != _DATA:
        return None
    length = shift = 0
    for at, byte in enumerate(received[1:_LONGEST_PREFIX], 2):
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return memoryview(received)[at:] if len(received) - at == length else None
    return None
