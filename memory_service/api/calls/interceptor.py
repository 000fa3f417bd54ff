"""The interceptor of gRPC's server: every call of the memory service passes it, is observed there from its first to its
last moment, and runs among the calls under way.

This file owns that what a caller can vary (a method that does not exist, names, ids) never becomes a label of a metric.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Any

import grpc

from memory_service.api.calls.running import Calls
from memory_service.domain.access import Caller
from memory_service.observe.observation import Observer, request_id
from memory_service.observe.request import Request

ID_KEY = "x-request-id"
_SERVICE = "/kvbank.v1.MemoryService/"


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Hands every request of the memory service to the observer, and has it run among the calls under way."""

    def __init__(self, observer: Observer, calls: Calls) -> None:
        self._observer = observer
        self._calls = calls
        self._handlers: dict[str, Any] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Return the handler of a method, which is wrapped once."""
        method = details.method
        if (wrapped := self._handlers.get(method)) is not None:
            return wrapped
        handler = await continuation(details)
        if handler is None:
            self._observer.unknown(method)
        elif method.startswith(_SERVICE):
            handler = self._handlers[method] = self._wrap(method.removeprefix(_SERVICE), handler)
        return handler

    def _wrap(self, method: str, handler: Any) -> Any:
        codecs = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), *codecs)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), *codecs)
        return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), *codecs)

    def _unary(self, method: str, inner: Any) -> Any:
        async def call(message: Any, context: Any) -> Any:
            with self._observed(method, context):
                return await self._calls.run(context, inner(message, context))

        return call

    def _stream(self, method: str, inner: Any) -> Any:
        # This is no generator, because gRPC would be the one that runs it, so that a call that waits for its answers to
        # be taken could not be ended with a reason.
        async def call(messages: Any, context: Any) -> None:
            with self._observed(method, context):
                await self._calls.run(context, _written(inner(messages, context), context))

        return call

    def _observed(self, method: str, context: Any) -> AbstractContextManager[None]:
        found = next((value for key, value in context.invocation_metadata() or () if key == ID_KEY), None)
        request = Request(request_id(found), method, peer=context.peer(), caller=Caller.owner())
        return self._observer.of(request, partial(_code, context))


async def _written(answers: AsyncGenerator[Any], context: Any) -> None:
    async with aclosing(answers):
        async for answer in answers:
            await context.write(answer)


def _code(context: Any, error: BaseException | None) -> str:
    if error is None:
        code = context.code()  # None where the call said nothing of it
        return "OK" if code is None else str(code.name)
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        remaining = context.time_remaining()
        return "CANCELLED" if remaining is None or remaining > 0 else "DEADLINE_EXCEEDED"
    return "UNKNOWN"
