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
    """A channel of the blocking client to one address, a `Transport`."""

    def __init__(self, address: str, route: channel.Route) -> None:
        """Make a channel to one of the addresses of a route; nothing is sent before the first call."""
        self._metadata = partial(channel.metadata, others=route.metadata)
        self._channel = _channel(grpc, address, route, _READ_BY_THE_CALLER)
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

    def upload(self, method: str, requests: Iterator[Any], timeout: float, request_id: str) -> Any:
        """Begin a call of many requests with one answer and return it: iterate over it for the answer, or `cancel`
        it."""
        return getattr(self._stub, method)(requests, timeout=timeout, metadata=self._metadata(request_id))

    def close(self) -> None:
        """Close the channel to the server; calls under way fail."""
        self._channel.close()


class AsyncGrpc:
    """A channel of the asyncio client, an `AsyncTransport`, made in the event loop to which it then belongs."""

    def __init__(self, address: str, route: channel.Route) -> None:
        """Make a channel to one address, as `Grpc` does."""
        self._metadata = partial(channel.metadata, others=route.metadata)
        self._channel = _channel(grpc.aio, address, route)
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
        """Close the channel to the server; calls under way fail."""
        await self._channel.close()


def answered_once(call: Any) -> None:
    """Wait for the one answer of an upload, which says nothing. Errors: grpc.RpcError; Internal where there is none."""
    if sum(1 for _ in call) != 1:
        raise odd("it has no answer, or several")


def _channel(kind: Any, address: str, route: channel.Route, more: Options = ()) -> Any:
    """Make a channel to an address. kind: the module of gRPC that makes it. more: channel arguments."""
    target, options = addresses.for_grpc(address), [*channel.for_address(address, route.options), *more]
    if route.tls is None:
        return kind.insecure_channel(target, options=options)
    return kind.secure_channel(target, route.tls.credentials(), options=[*options, *route.tls.options()])
