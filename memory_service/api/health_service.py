"""gRPC's health service, which everybody may call, without a key. This file owns that these calls leave room for all
others, and that no caller holds up the health by taking no answer: gRPC's own service tells watchers one by one.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2

from memory_service.api.calls.awaited import first

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_Call = Callable[[Any, Any], Awaitable[Any]]


class HealthService(health.aio.HealthServicer):  # type: ignore[misc]
    """Answers what `set` has said of each service. Used in the event loop alone."""

    def __init__(self, most: int, patience: float) -> None:
        """Answer at most `most` calls at a time, those that watch, and those whose request has not come, included.
        patience: the seconds that a request may take."""
        super().__init__()
        self._most, self._patience = most, patience
        self._calls = 0
        self._told: dict[str, Any] = {}
        # Set, and replaced by another one, at each change.
        self._changed = asyncio.Event()

    def handlers(self) -> dict[str, Any]:
        """Make gRPC's handlers, by method. Each asks for the request of a call when the call is counted: on the wire a
        call with one message is a stream of one."""
        made = {}
        for method in health_pb2.DESCRIPTOR.services_by_name["Health"].methods:
            kind = (
                grpc.stream_stream_rpc_method_handler
                if method.name == "Watch"
                else grpc.stream_unary_rpc_method_handler
            )
            reads, writes = map(GetMessageClass, (method.input_type, method.output_type))
            answer = self._counted(getattr(self, method.name), reads.FromString)
            made[method.name] = kind(answer, response_serializer=writes.SerializeToString)
        return made

    def _counted(self, method: _Call, read: Callable[[bytes], Any]) -> _Call:
        """Make a method of a request one of a stream of bytes, whose calls are counted. Requests are read here, since
        gRPC would log each one that cannot be read with a traceback, and anybody may call."""

        async def call(messages: Any, context: Any) -> Any:
            await self._let_in(context)
            data: Any = None
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience):
                    data = await first(messages)
            if data is None:
                await context.abort(_INVALID, "the request of the call has not come")
            try:
                request = read(data)
            except DecodeError:
                await context.abort(_INVALID, "the request of the call cannot be read")
            return await method(request, context)

        return call

    async def set(self, service: str, status: Any) -> None:
        """Say the health of a service from now on."""
        await super().set(service, status)
        self._told[service] = status
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Answer with the health of a service. Errors: NOT_FOUND."""
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Answer with the health of a service now, and at each change."""
        last = None
        while True:
            changed, status = self._changed, self._told.get(request.service, _UNKNOWN)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
            last = status
            await changed.wait()

    async def List(self, _: Any, context: Any) -> None:  # noqa: N802
        """Refuse to list all services: callers name one. Errors: UNIMPLEMENTED."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask for one service, by Check or Watch")

    async def _let_in(self, context: Any) -> None:
        """Count a call until its answer has been sent. Errors: RESOURCE_EXHAUSTED."""
        if self._calls >= self._most:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._most} callers ask for the health already")
        self._calls += 1
        context.add_done_callback(self._left)

    def _left(self, _: Any) -> None:
        self._calls -= 1
