"""gRPC's health service, which everybody may call, without a key. This file owns that these calls leave room for all
others, and that no caller holds up the health by taking no answer: gRPC's own service tells watchers one by one.
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health.aio.HealthServicer):  # type: ignore[misc]
    """Answers what `set` has said of each service. Used in the event loop alone."""

    def __init__(self, most: int) -> None:
        """Answer at most `most` calls at a time, those that watch included."""
        super().__init__()
        self._most = most
        self._calls = 0
        self._told: dict[str, Any] = {}
        # Set, and replaced by another one, at each change.
        self._changed = asyncio.Event()

    async def set(self, service: str, status: Any) -> None:
        """Say the health of a service from now on."""
        await super().set(service, status)
        self._told[service] = status
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Answer with the health of a service. Errors: NOT_FOUND, RESOURCE_EXHAUSTED."""
        await self._let_in(context)
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """Answer with the health of a service now, and at each change. Errors: RESOURCE_EXHAUSTED."""
        await self._let_in(context)
        last = None
        while True:
            changed, status = self._changed, self._told.get(request.service, _UNKNOWN)
            if status != last:
                await context.write(health_pb2.HealthCheckResponse(status=status))
            last = status
            await changed.wait()

    async def _let_in(self, context: Any) -> None:
        """Count a call until its answer has been sent. Errors: RESOURCE_EXHAUSTED."""
        if self._calls >= self._most:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._most} callers ask for the health already")
        self._calls += 1
        context.add_done_callback(self._left)

    def _left(self, _: Any) -> None:
        self._calls -= 1
