"""The interceptor of gRPC's server: every call but those of health passes it, is observed there from its first to its
last moment, and runs among the calls under way once its caller was let in.

This file owns that what a caller can vary (a method that does not exist, names, ids) never becomes a label of a metric.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health

from memory_service.access.certificates import NOTHING, Shown
from memory_service.api.calls import running
from memory_service.api.calls.admission import Admission
from memory_service.api.calls.awaited import Awaited, first
from memory_service.api.calls.running import Calls
from memory_service.api.messages.status import to_service_error
from memory_service.domain.errors import invalid
from memory_service.observe.observation import Observer, request_id
from memory_service.observe.request import Request

ID_KEY = "x-request-id"
# The properties of gRPC's connections with the names in a certificate, and with it and those that it was signed by.
_SAN, _PEM = "x509_subject_alternative_name", ("x509_pem_cert", "x509_pem_cert_chain")
_OPEN = f"/{health.SERVICE_NAME}/"


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Hands every request to the observer, lets its caller in, and has it run among the calls under way.

    The message of a call is asked for once its caller was let in, so that nothing is held in memory for a caller that
    is refused. So every method is one of streams here; on the wire a call with one message is a stream of one.
    """

    def __init__(self, observer: Observer, calls: Calls, admission: Admission, awaited: Awaited) -> None:
        self._observer = observer
        self._calls = calls
        self._admission = admission
        self._awaited = awaited
        self._handlers: dict[str, Any] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Return the handler of a method, which is wrapped once."""
        method = details.method
        if (wrapped := self._handlers.get(method)) is None:
            handler = await continuation(details)
            if handler is None:
                self._observer.unknown(method)
            if handler is None or method.startswith(_OPEN):
                return handler
            wrapped = self._handlers[method] = self._wrap(method.rpartition("/")[2], handler)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:
        codecs = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(self._call(method, self._one(handler.unary_unary)), *codecs)
        if handler.unary_stream:
            inner = self._one(partial(_written, handler.unary_stream))
        else:
            inner = partial(_written, handler.stream_stream)
        return grpc.stream_stream_rpc_method_handler(self._call(method, inner), *codecs)

    def _call(self, method: str, inner: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        # This is no generator, because gRPC would be the one that runs it, so that a call that waits for its answers to
        # be taken could not be ended with a reason.
        async def handled(messages: Any, context: Any) -> Any:
            return await inner(messages, context) if await self._let_in(method, context) else b""

        async def call(messages: Any, context: Any) -> Any:
            with self._observed(method, context):
                return await self._calls.run(context, handled(messages, context))

        return call

    def _one(self, inner: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        """Make of what answers one message what is called with a stream of one."""

        async def call(messages: Any, context: Any) -> Any:
            with self._awaited.request_of(running.current()):
                message = await first(messages)
            if message is None:
                running.refuse(context, invalid("request", "is missing"))
                return b""
            return await inner(message, context)

        return call

    async def _let_in(self, method: str, context: Any) -> bool:
        """Tell whether the caller of the running call may make it; else the call ends with an error that says so."""
        try:
            metadata = context.invocation_metadata() or ()
            shown = _shown(context) if self._admission.knows_certificates else NOTHING
            caller = await self._admission.caller(metadata, context.peer(), shown)
            self._calls.let_in(running.current(), caller, shown.pem)
            await self._admission.admit(method, caller, context.time_remaining())
        except Exception as error:
            running.refuse(context, to_service_error(error))
            return False
        return True

    def _observed(self, method: str, context: Any) -> AbstractContextManager[None]:
        found = next((value for key, value in context.invocation_metadata() or () if key == ID_KEY), None)
        request = Request(request_id(found), method, peer=context.peer())
        return self._observer.of(request, partial(_code, context))


async def _written(inner: Any, messages: Any, context: Any) -> None:
    """Send the answers to a message, or to a stream of them."""
    async with aclosing(inner(messages, context)) as answers:
        async for answer in answers:
            await context.write(answer)


def _shown(context: Any) -> Shown:
    """Return what the caller has shown of its certificate when it connected."""
    found = context.auth_context()
    names = [name.decode(errors="replace") for name in found.get(_SAN, ())]
    return Shown(names, b"".join(part for name in _PEM for part in found.get(name, ())))


def _code(context: Any, error: BaseException | None) -> str:
    if error is None:
        code = context.code()  # None where the call said nothing of it
        return "OK" if code is None else str(code.name)
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        remaining = context.time_remaining()
        return "CANCELLED" if remaining is None or remaining > 0 else "DEADLINE_EXCEEDED"
    return "UNKNOWN"
