"""The pace of a caller who sends a stream for which the service keeps room on the disk. This file owns that one who
sends nothing, or next to nothing, does not keep that room for long."""

import asyncio
from collections.abc import AsyncIterator

from memory_service.api.calls.budget import LEAST_RATE
from memory_service.api.messages.parsing import Received
from memory_service.domain.errors import ServiceError


async def in_pace(sent: AsyncIterator[Received], stalled: float) -> AsyncIterator[Received]:
    """Yield what is sent. stalled: the seconds that the caller may be behind LEAST_RATE, while the service waits for
    it. Errors: NOT_SERVING."""
    left, loop = stalled, asyncio.get_running_loop()
    while True:
        begun = loop.time()
        try:
            async with asyncio.timeout(left):
                received = await anext(sent)
        except StopAsyncIteration:
            return
        except TimeoutError:
            text = f"the caller is {stalled:g} s behind {LEAST_RATE >> 10} KiB a second"
            raise ServiceError("NOT_SERVING", text) from None
        left = min(stalled, left - (loop.time() - begun) + len(received.data) / LEAST_RATE)
        yield received
        del received
