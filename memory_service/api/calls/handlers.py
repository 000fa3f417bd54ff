"""How a method of the service becomes a call of gRPC: it gets the bytes of a request and gives the bytes of an answer,
it runs in a storage thread when it is its turn, and whatever it raises ends the call with a status that carries a
reason.

So the event loop, which all calls share, only passes bytes on. This file owns the bound on the requests in memory.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from inspect import isasyncgenfunction
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

from kvbank.wire import frames
from memory_service.api.calls import running
from memory_service.api.calls.fairness import Holdings
from memory_service.api.calls.storage_threads import StorageThreads
from memory_service.api.calls.turns import ORDINARY_BYTES, AnswerTurns
from memory_service.api.messages import naming
from memory_service.api.messages.parsing import LARGEST_REQUEST, SHORT, Received, deserializer
from memory_service.api.messages.status import serialized, to_service_error, without_frames
from memory_service.domain.access import Caller
from memory_service.domain.errors import ServiceError
from memory_service.domain.limits import Pauses
from memory_service.observe import request as requests

T = TypeVar("T")


class HeldRequests:
    """Counts the bytes of the requests in memory, from their coming to the end of their calls, and bounds them. A
    request that does not fit is refused: if it waited, it would hold the very memory that there is no room for. Used in
    the event loop alone."""

    def __init__(self, limit: int) -> None:
        """Bound the requests to `limit` bytes together, and those of one tenant to three quarters of that; a single one
        may be larger."""
        self._limit = limit
        self._held = Holdings()

    @contextmanager
    def of(self, received: Received) -> Iterator[None]:
        """Count a request in the block. Errors: NOT_SERVING (the request can be made again) when there are too many."""
        size, owner = len(received.data), running.current().owner
        for taken, limit in ((self._held.total, self._limit), (self._held.of_tenant(owner), self._limit * 3 // 4)):
            if size > SHORT and taken and taken + size > limit:
                text = f"there is no room for one more request of {size} bytes; it can be made again"
                raise ServiceError("NOT_SERVING", text)
        self._held.add(owner, size)
        try:
            yield
        finally:
            self._held.add(owner, -size)


@dataclass(frozen=True, slots=True)
class Handling:
    """What the calls of a service share: threads, turns, the requests in memory, the most bytes of a message,
    and the points that a test waits at."""

    threads: StorageThreads
    turns: AnswerTurns
    held: HeldRequests
    most_bytes: int
    pauses: Pauses


class HandledService:
    """The base of a service whose methods are made calls by the decorators of this file."""

    def __init__(self, handling: Handling) -> None:
        self.handling = handling


def current_caller() -> Caller:
    """Return the caller of this call. Errors: RuntimeError, a defect, where no interceptor has said whose call it
    is."""
    request = requests.current()
    if request is None or request.caller is None:
        raise RuntimeError("a call has come to its method without a caller")
    return request.caller


def asked(received: Received) -> tuple[Caller, Any]:
    """Return the caller and the message of a request, and note the bank that it names. Errors: TOO_LARGE,
    INVALID_FIELD; PERMISSION_DENIED for a bank that the caller may not name."""
    made, caller = received.message(), current_caller()
    if request := requests.current():
        request.of(made)
    caller.check_may_use(naming.banks(made))
    return caller, made


def unary(method: Callable[[Any, Caller, Any], Message]) -> Callable[..., Awaitable[bytes]]:
    """Make a method of a caller and its message, which is short and blocks, a call that runs it in a storage thread,
    and answers in bytes."""

    def answer(self: HandledService, received: Received) -> bytes:
        return serialized(method(self, *asked(received)), self.handling.most_bytes)

    @wraps(method)
    async def call(self: HandledService, received: Received) -> bytes:
        async with self.handling.threads.turn(method.__name__, short=True) as turn:
            answered: bytes = await turn.run(answer, self, received)
        return answered

    return refusing(call)


def wide(method: Callable[[Any, Caller, Any], Message]) -> Callable[..., AsyncIterator[bytes]]:
    """Do as `unary` for a method that looks at many chunks or banks, or whose answer may be long. A long answer holds a
    share of the budget until it is sent; while it waits for that it keeps its turn, so that few of a kind wait.
    """

    def answer(self: HandledService, received: Received) -> bytes:
        self.handling.pauses.reach("answer")
        return serialized(method(self, *asked(received)), self.handling.most_bytes)

    @wraps(method)
    async def call(self: HandledService, received: Received) -> AsyncIterator[bytes]:
        async with AsyncExitStack() as held:
            async with self.handling.threads.turn(method.__name__) as turn:
                answered = await turn.run(answer, self, received)
                if len(answered) > ORDINARY_BYTES:
                    await held.enter_async_context(self.handling.turns.share(len(answered)))
            yield answered

    return streaming(call)


def refusing(method: Callable[[Any, Received], Awaitable[bytes]]) -> Callable[..., Awaitable[bytes]]:
    """Make a method a call that ends with a status, whatever the method raises."""

    @wraps(method)
    async def call(self: HandledService, received: Received, context: Any) -> bytes:
        try:
            with self.handling.held.of(received):
                return await method(self, received)
        except Exception as error:
            _refuse(context, error)
        return b""  # not sent

    return call


def streaming(method: Callable[..., AsyncIterator[T]]) -> Callable[..., AsyncIterator[T]]:
    """Do as `refusing` for a method that answers a request, or a stream of them, with a stream."""

    @wraps(method)
    async def call(self: HandledService, received: Any, context: Any) -> AsyncIterator[T]:
        try:
            with self.handling.held.of(received) if isinstance(received, Received) else nullcontext():
                async for answer in method(self, received):
                    yield answer
        except Exception as error:
            _refuse(context, error)

    return call


def _refuse(context: Any, error: Exception) -> None:
    """End a call with the status of an error, and let go of what the error holds."""
    running.refuse(context, to_service_error(error))
    without_frames(error)


def handlers(service: HandledService, described: ServiceDescriptor) -> dict[str, Any]:
    """Make gRPC's handlers, by method of the service that is described, which get requests and give answers as bytes.

    A method whose one answer waits to be sent is a stream of one, which is the same on the wire.
    """
    most_bytes = service.handling.most_bytes
    # A header of WriteChunks has one vector, and its tensors come as frames of data, which are not parsed.
    largest = {"Retrieve": most_bytes, "RetrieveFiles": most_bytes, "GetServerInfo": SHORT}
    made = {}
    for method in described.methods:
        call = getattr(service, method.name)
        handler = _HANDLERS[method.client_streaming, isasyncgenfunction(call)]
        reads = deserializer(method.input_type, largest.get(method.name, LARGEST_REQUEST))
        made[method.name] = handler(call, reads, frames.serializer)
    return made


_HANDLERS: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
