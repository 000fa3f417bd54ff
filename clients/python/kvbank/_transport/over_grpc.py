"""Calls over gRPC, for both clients."""

from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import grpc
import grpc.aio
from grpc.experimental import ChannelOptions

from kvbank._calls.answers import odd
from kvbank._transport import channel
from kvbank.wire import addresses
from kvbank.wire.stub import make_stub

Options = Sequence[tuple[str, Any]]

# The thread that calls reads an answer itself; by default two more would hand it each frame.
_READ_BY_THE_CALLER = ((ChannelOptions.SingleThreadedUnaryStream, 1),)


class Grpc:
    """A channel of the blocking client, a `Transport`."""

    def __init__(self, address: str, options: Options, metadata: channel.Metadata = ()) -> None:
        """Make a channel to `address`; nothing is sent before the first call. options: all gRPC channel arguments, see
        `channel.with_defaults`. metadata: what goes with every call."""
        self._metadata = partial(channel.metadata, others=metadata)
        self._channel = grpc.insecure_channel(addresses.for_grpc(address), options=[*options, *_READ_BY_THE_CALLER])
        self._stub: Any = make_stub(self._channel)

    def unary(self, method: str, request: Any, timeout: float, request_id: str) -> Any:
        """Make a call with one answer, and return it."""
        return getattr(self._stub, method)(request, timeout=timeout, metadata=self._metadata(request_id))

    def stream(self, method: str, request: Any, timeout: float, request_id: str) -> Generator[Any]:
        """Make a call with many answers, and yield them; closing the generator ends the call."""
        call = getattr(self._stub, method)(request, timeout=timeout, metadata=self._metadata(request_id))
        try:
            yield from call
        finally:
            call.cancel()

    def write(self, requests: Iterator[Any], request_id: str) -> Any:
        """Begin a WriteChunks call and return it: iterate over it for the acknowledgements, or `cancel` it."""
        return self._stub.WriteChunks(requests, metadata=self._metadata(request_id))

    def close(self) -> None:
        """Close this channel to the server; calls under way fail."""
        self._channel.close()


class AsyncGrpc:
    """A channel of the asyncio client, an `AsyncTransport`, to be made in the event loop to which it then belongs."""

    def __init__(self, address: str, options: Options, metadata: channel.Metadata = ()) -> None:
        """Make a channel, as `Grpc` does."""
        self._metadata = partial(channel.metadata, others=metadata)
        self._channel = grpc.aio.insecure_channel(addresses.for_grpc(address), options=list(options))
        self._stub: Any = make_stub(self._channel)

    async def unary(self, method: str, request: Any, timeout: float, request_id: str) -> Any:
        """Make a call with one answer, and return it. Errors: Internal for bytes that are no message of the method."""
        call = getattr(self._stub, method)(request, timeout=timeout, metadata=self._metadata(request_id))
        answer = await call
        if answer is None:  # grpc.aio's word for bytes that are no message
            raise odd("its bytes are no message of this method")
        return answer

    async def stream(self, method: str, request: Any, timeout: float, request_id: str) -> AsyncGenerator[Any]:
        """Make a call with many answers, and yield them; closing the generator ends the call."""
        call = getattr(self._stub, method)(request, timeout=timeout, metadata=self._metadata(request_id))
        try:
            async for frame in call:
                yield frame
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close this channel to the server; calls under way fail."""
        await self._channel.close()
