"""A server in this process, for tests and for clients that open a data folder themselves: it runs in a thread with an
event loop of its own, so that the caller may block, or run a loop too."""

import asyncio
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from memory_service.api.server import Server
from memory_service.domain.clock import Clock
from memory_service.domain.limits import NO_PAUSES, STANDARD, Limits, Pauses
from memory_service.operations.banks import Banks
from memory_service.settings import load


class LocalServer:
    """Serves a data folder from its making to `stop`, or to the end of the `with` block.

    `address` is what clients connect to; `metrics_address` is the HOST:PORT of /metrics, or empty.
    """

    def __init__(
        self,
        data: str | Path,
        listen: str = "127.0.0.1:0",
        *,
        clock: Clock | None = None,
        limits: Limits = STANDARD,
        pauses: Pauses = NO_PAUSES,
        **settings: Any,
    ) -> None:
        """Start the server, and return once it serves.

        settings: further fields of memory_service.settings.Settings. clock, limits, pauses: where a test hands in its
        own. Errors: StartError, SettingsError.
        """
        self._settings = load({"data": data, "listen": listen, **settings})
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvbank-server", daemon=True)
        self._thread.start()
        started = self._start(clock, limits, pauses)
        try:
            self._server: Server | None = asyncio.run_coroutine_threadsafe(started, self._loop).result()
        except BaseException:
            self._end_loop()
            raise
        self.address = self._server.address
        self.metrics_address = self._server.metrics_address

    @property
    def server(self) -> Server:
        """Return the server in the thread. Not for after `stop`."""
        assert self._server is not None
        return self._server

    @property
    def banks(self) -> Banks:
        """Return what is served, for a test that holds up its store or looks into it. Not for after `stop`."""
        return self.server.banks

    async def _start(self, clock: Clock | None, limits: Limits, pauses: Pauses) -> Server:
        server = Server(self._settings, clock, limits=limits, pauses=pauses)
        await server.start()
        return server

    def stop(self) -> None:
        """Finish the calls that run, and close the data folder. A second call does nothing."""
        server, self._server = self._server, None
        if server is not None:
            asyncio.run_coroutine_threadsafe(server.stop(), self._loop).result()
            self._end_loop()

    def _end_loop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._loop.shutdown_default_executor(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "LocalServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
