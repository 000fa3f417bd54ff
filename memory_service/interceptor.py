"""Every request of the memory service, from its first to its last moment: named, counted, timed and logged.

What a caller can vary (a method that does not exist, names, ids) never becomes a label, and is cut before it is logged.
"""

import asyncio
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from typing import Any

import grpc

from memory_service import requests
from memory_service.decoding import tolerant
from memory_service.metrics import Metrics
from memory_service.requests import LONGEST_LOGGED, Request

ID_KEY = "x-request-id"
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_SERVICE = "/kvbank.v1.MemoryService/"
# Codes that are the service's trouble and not the caller's.
_TROUBLE = ("INTERNAL", "UNKNOWN", "DATA_LOSS", "UNAVAILABLE")
# Reasons that mean bytes which are not what they should be, and where that was seen.
_CHECKSUMS = {"CHECKSUM_IN_TRANSIT": "write", "CHECKSUM_MISMATCH": "read"}
_log = logging.getLogger(__name__)


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Names, counts, times and logs every request of the memory service."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._handlers: dict[str, Any] = {}
        # Finding the instrument of some labels costs more than using it.
        self._seconds = cache(metrics.request_seconds.labels)
        # Requests under way; touched by the event loop only.
        self.running: Counter[str] = Counter()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The handler, wrapped once a method."""
        method = details.method
        if (wrapped := self._handlers.get(method)) is not None:
            return wrapped
        handler = await continuation(details)
        if handler is None:
            self._metrics.errors.labels("unknown", "UNIMPLEMENTED").inc()
            _log.debug("there is no method %s", method[:LONGEST_LOGGED])
        elif method.startswith(_SERVICE):
            handler = self._handlers[method] = self._wrap(method.removeprefix(_SERVICE), handler)
        return handler

    def _wrap(self, method: str, handler: Any) -> Any:
        self._metrics.requests_running.labels(method).set_function(lambda: self.running[method])
        codecs = (tolerant(handler.request_deserializer), handler.response_serializer)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), *codecs)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), *codecs)
        return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), *codecs)

    def _unary(self, method: str, inner: Any) -> Any:
        async def call(message: Any, context: Any) -> Any:
            with _Observation(self, method, message, context):
                return await inner(message, context)

        return call

    def _stream(self, method: str, inner: Any) -> Any:
        async def call(messages: Any, context: Any) -> AsyncIterator[Any]:
            with _Observation(self, method, messages, context):
                async for answer in inner(messages, context):
                    yield answer

        return call

    def ended(self, request: Request, code: str, seconds: float) -> None:
        """Count and log it."""
        self._seconds(request.method, code).observe(seconds)
        if code not in ("OK", "CANCELLED"):
            self._metrics.errors.labels(request.method, request.reason or code).inc()
        if at := _CHECKSUMS.get(request.reason):
            self._metrics.checksum_failures.labels(at).inc()
        level = logging.WARNING if code in _TROUBLE or request.reason == "DISK_FULL" else logging.DEBUG
        _log.log(level, "%s %s %.6f s", code, request.reason or "-", seconds)


class _Observation:
    """From the first to the last moment of a request."""

    __slots__ = ("_context", "_interceptor", "_request", "_start")

    def __init__(self, interceptor: Interceptor, method: str, message: Any, context: Any) -> None:
        self._interceptor = interceptor
        self._context = context
        self._request = Request(_request_id(context), method)
        self._request.of(message)

    def __enter__(self) -> None:
        requests.enter(self._request)
        self._interceptor.running[self._request.method] += 1
        self._start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        seconds = time.perf_counter() - self._start
        self._interceptor.ended(self._request, _code(error, self._context), seconds)
        self._interceptor.running[self._request.method] -= 1


def _code(error: BaseException | None, context: Any) -> str:
    if error is None:
        return "OK"
    if isinstance(error, grpc.aio.AbortError):
        return str(context.code().name)
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        remaining = context.time_remaining()
        return "CANCELLED" if remaining is None or remaining > 0 else "DEADLINE_EXCEEDED"
    return "UNKNOWN"


def _request_id(context: Any) -> str:
    """The caller's where it is one, else a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == ID_KEY and isinstance(value, str) and _ID.fullmatch(value):
            return value
    return secrets.token_hex(8)
