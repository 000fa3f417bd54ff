"""The frames of a write stream. A chunk is a header, and then as many bytes as its tensors have, in any number of
frames of data; chunks without bytes may share a frame of headers. This file owns that order.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from kvbank.v1 import service_pb2 as pb
from kvbank.wire import frames as _frames
from memory_service.api.messages.parsing import SHORT, Received
from memory_service.api.streams.incoming import ChunkBytes
from memory_service.domain.errors import invalid


async def frames(requests: AsyncIterator[Received], run: Callable[..., Awaitable[Any]]) -> AsyncIterator[Any]:
    """Yield the frames of a stream that writes chunks or a window: views of data, and messages with headers.

    run: makes a call in a storage thread. Errors: those of `Parser`.
    """
    async for received in requests:
        frame: Any = _frames.data(received.data)
        if frame is None:
            message = received.message() if len(received.data) <= SHORT else await run(received.message)
            frame = memoryview(message.data) if message.HasField("data") else message
        del received  # what is done with the frame may take long
        yield frame
        del frame


class Begun(Protocol):
    """A chunk whose header has come."""

    bytes: ChunkBytes


C = TypeVar("C", bound=Begun)


class FrameReader(Generic[C]):
    """Puts the frames of one stream together to chunks. It does no I/O, and waits for nothing."""

    def __init__(self) -> None:
        # The chunk whose bytes are coming in.
        self.open: C | None = None

    def headers(self, frame: Any) -> Iterator[pb.ChunkHeader]:
        """Yield the headers of a frame, each of which is to be fed as a chunk before the next one. Errors:
        INVALID_FIELD."""
        if self.open is not None:
            raise invalid("data", f"{self.open.bytes.missing} bytes of the chunk before are missing")
        if frame.WhichOneof("frame") != "headers":
            yield frame.header
            return
        if not frame.headers.headers:  # frames of no chunk count for no rate
            raise invalid("headers", "has no header")
        for header in frame.headers.headers:
            yield header
            if self.open is not None:
                raise invalid("headers", "a chunk with bytes to come has a frame of its own")

    def expecting(self) -> C:
        """Return the chunk that bytes which come now belong to. Errors: INVALID_FIELD."""
        if self.open is None:
            raise invalid("data", "bytes without a header")
        return self.open

    def feed(self, frame: C | memoryview) -> C | None:
        """Take a chunk that begins, or some of its bytes; return the chunk when it is complete, else None. Errors:
        INVALID_FIELD."""
        if isinstance(frame, memoryview):
            self.expecting().bytes.add(frame)
        else:
            self.open = frame
        if self.open is None or self.open.bytes.missing:
            return None
        complete, self.open = self.open, None
        return complete

    def end(self) -> None:
        """Take the end of the stream. Errors: INVALID_FIELD where bytes are missing."""
        if self.open is not None:
            raise invalid("data", f"the stream ended {self.open.bytes.missing} bytes early")
