"""The interceptor of gRPC's server: every call but those of health passes it, is observed there from its first to its
last moment, and runs among the calls under way once its caller was let in.

This file owns that what a caller can vary (a method that does not exist, names, ids) never becomes a label of a metric.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health

from memory_service.access.certificates import NOTHING, Shown
from memory_service.api.calls import running
from memory_service.api.calls.admission import Admission
from memory_service.api.calls.running import Calls
from memory_service.api.messages.status import to_service_error
from memory_service.domain.errors import invalid
from memory_service.observe.observation import Observer, request_id
from memory_service.observe.request import Request

ID_KEY = "x-request-id"
# The properties of gRPC's connections with the names in a certificate, and with it and those that it was signed by.
_SAN, _PEM = "x509_subject_alternative_name", ("x509_pem_cert", "x509_pem_cert_chain")
_OPEN = f"/{health.SERVICE_NAME}/"


class _Handlers(NamedTuple):
    """The handlers of a method: `plain` gets the message with a call that has passed; `careful` asks for it once the
    caller was let in, so that nothing is held in memory for a call that is refused or waits."""

    plain: Any
    careful: Any


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Hands every request to the observer, lets its caller in, and has it run among the calls under way."""

    def __init__(self, observer: Observer, calls: Calls, admission: Admission) -> None:
        self._observer = observer
        self._calls = calls
        self._admission = admission
        self._handlers: dict[str, _Handlers] = {}

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
        return wrapped.plain if self._admission.passes(details.invocation_metadata or ()) else wrapped.careful

    def _wrap(self, method: str, handler: Any) -> _Handlers:
        codecs = (handler.request_deserializer, handler.response_serializer)
        careful = self._stream(method, partial(self._read, handler), counted=False)
        if handler.unary_unary:
            plain = grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), *codecs)
        elif handler.unary_stream:
            called = partial(_written, handler.unary_stream)
            plain = grpc.unary_stream_rpc_method_handler(self._stream(method, called), *codecs)
        else:
            called = partial(_written, handler.stream_stream)
            plain = grpc.stream_stream_rpc_method_handler(self._stream(method, called), *codecs)
        # On the wire a call with one message is a stream of one.
        return _Handlers(plain, grpc.stream_stream_rpc_method_handler(careful, *codecs))

    def _unary(self, method: str, inner: Any) -> Any:
        async def handled(message: Any, context: Any) -> Any:
            return await inner(message, context) if await self._let_in(method, context, counted=True) else b""

        async def call(message: Any, context: Any) -> Any:
            with self._observed(method, context):
                return await self._calls.run(context, handled(message, context))

        return call

    def _stream(self, method: str, inner: Callable[[Any, Any], Awaitable[None]], *, counted: bool = True) -> Any:
        # This is no generator, because gRPC would be the one that runs it, so that a call that waits for its answers to
        # be taken could not be ended with a reason.
        async def handled(messages: Any, context: Any) -> None:
            if await self._let_in(method, context, counted):
                await inner(messages, context)

        async def call(messages: Any, context: Any) -> None:
            with self._observed(method, context):
                await self._calls.run(context, handled(messages, context))

        return call

    async def _read(self, handler: Any, messages: Any, context: Any) -> None:
        """Read what a caller that was let in sends, and send the answers of the handler."""
        if handler.stream_stream:
            await _written(handler.stream_stream, messages, context)
            return
        async for message in messages:
            if handler.unary_stream:
                await _written(handler.unary_stream, message, context)
            else:
                answer = await handler.unary_unary(message, context)
                if not context.code():
                    await context.write(answer)
            return
        running.refuse(context, invalid("request", "is missing"))

    async def _let_in(self, method: str, context: Any, counted: bool) -> bool:
        """Tell whether the caller of the running call may make it; else the call ends with an error that says so.
        counted: whether the call has passed."""
        try:
            metadata = context.invocation_metadata() or ()
            shown = _shown(context) if self._admission.knows_certificates else NOTHING
            caller = await self._admission.caller(metadata, context.peer(), shown)
            self._calls.let_in(running.current(), caller, shown.pem)
            await self._admission.admit(method, caller, context.time_remaining(), counted)
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
