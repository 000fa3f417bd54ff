"""gRPC's health service (grpc.health.v1). This file owns the look at the storage, without which nothing can be
served."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from memory_service.api.health_service import HealthService
from memory_service.domain.limits import STANDARD, Limits
from memory_service.observe.troubles import Troubles

NAME = health.SERVICE_NAME
# Seconds that one look at the storage may take.
_PATIENCE_S = 5.0


class Health:
    """Tells SERVING while no trouble stops the service, and NOT_SERVING otherwise. Between `begin` and `end` it also
    asks the storage again and again, and notes among the troubles whether the storage fails to answer."""

    def __init__(
        self,
        troubles: Troubles,
        services: Sequence[str],
        probe: Callable[[], None],
        most: int,
        limits: Limits = STANDARD,
    ) -> None:
        """Tell the health of `services` by these names, besides that of the whole, to at most `most` callers at a time.
        probe: a call that reads the storage; it blocks, and raises the error of a storage that fails."""
        self._troubles = troubles
        self._services = ("", *services)
        self._probe = probe
        self._every = limits.probe_s
        self._servicer = HealthService(most, limits.request_s)
        self._told: bool | None = None
        self._looking: asyncio.Task[None] | None = None
        self._asked: asyncio.Future[None] | None = None

    def add_to(self, server: Any) -> None:
        """Let a server of grpc.aio answer callers that ask for the health."""
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, self._servicer.handlers()),))

    async def begin(self) -> None:
        """Tell the health for the first time, and begin to ask the storage."""
        await self.tell()
        self._looking = asyncio.create_task(self._look())

    async def end(self) -> None:
        """Stop asking the storage, and wait some seconds for a probe that still runs."""
        if self._looking is not None:
            self._looking.cancel()
        if self._asked is not None:
            done, _ = await asyncio.wait([self._asked], timeout=_PATIENCE_S)
            for asked in done:
                asked.exception()

    async def tell(self) -> None:
        """Tell callers the health, where it is another one than they were told last."""
        serving = self._troubles.ready()
        if serving != self._told:
            self._told = serving
            status = health_pb2.HealthCheckResponse
            for name in self._services:
                await self._servicer.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def _look(self) -> None:
        while True:
            asked = self._asked = asyncio.ensure_future(asyncio.to_thread(self._probe))
            done, _ = await asyncio.wait([asked], timeout=_PATIENCE_S)
            if not done:
                self._troubles.begin("storage", f"it has not answered for {_PATIENCE_S} s", stops=True)
                await self.tell()
                await asyncio.wait([asked])
            if error := asked.exception():
                self._troubles.begin("storage", f"{type(error).__name__}: {error}", stops=True)
            else:
                self._troubles.end("storage")
            await self.tell()
            await asyncio.sleep(self._every)
