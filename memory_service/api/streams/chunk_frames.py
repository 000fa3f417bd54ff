"""The frames of a write stream, from the bytes that came: views of data, and messages."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from kvbank.wire import frames as _frames
from memory_service.api.messages.parsing import SHORT, Received


async def frames(requests: AsyncIterator[Received], run: Callable[..., Awaitable[Any]]) -> AsyncIterator[Any]:
    """Yield the frames of a write stream: views of data, and messages.

    run: makes a call in a storage thread. Errors: those of `Decoder`.
    """
    async for received in requests:
        frame: Any = _frames.data(received.data)
        if frame is None:
            message = received.message() if len(received.data) <= SHORT else await run(received.message)
            frame = memoryview(message.data) if message.WhichOneof("frame") == "data" else message
        del received  # what is done with the frame may take long
        yield frame
        del frame
