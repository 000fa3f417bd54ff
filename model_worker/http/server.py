"""The server of a worker listens while the model loads, and answers what has begun before it stops.

This file owns the end: after SIGTERM or Ctrl-C the worker is not ready any more and takes nothing new, ends when its
running answers have ended or their time is over, and at a second signal at once.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from model_worker.http.app import application
from model_worker.http.connection import Connection
from model_worker.http.metrics import Metrics
from model_worker.http.port import Port
from model_worker.model import MemoryModel
from model_worker.serve.served import Served


class Server(uvicorn.Server):
    """Serves `served` at a socket. grace: seconds that running answers get at the end. tls: certificate and key, files.

    load: makes the model, in a thread. ready: called once, when requests are answered. failed: the error with which
    the model could not be made, after which the server ends.
    """

    def __init__(
        self,
        served: Served,
        load: Callable[[], MemoryModel],
        *,
        ready: Callable[[], None] = lambda: None,
        grace: float = 30.0,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        files: dict[str, Any] = {} if tls is None else {"ssl_certfile": tls[0], "ssl_keyfile": tls[1]}
        self._metrics = Metrics(served)
        config = uvicorn.Config(
            application(served, self._metrics),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            http=Connection,
            ws="none",
            timeout_graceful_shutdown=max(1, round(grace)),
            **files,
        )
        super().__init__(config)
        self.failed: BaseException | None = None
        self._served, self._load, self._ready, self._grace = served, load, ready, grace
        self._signals = 0
        self._ending: asyncio.Task[None] | None = None
        self._ports: list[Port] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and to load the model."""
        await self.lifespan.startup()
        bounds = self._served.bounds
        self._ports = [
            Port(
                listening,
                self._connection,
                of_host=bounds.connections,
                patience=bounds.patience,
                tls=self.config.ssl,
                refused=self._metrics.refused,
            )
            for listening in sockets or ()
        ]
        self.servers, self.started = [], True
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._begin, name="kvbank-load", daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and end those that there are behind their answers."""
        for port in self._ports:
            port.close()
        await super().shutdown(sockets)

    def _connection(self) -> Connection:
        made = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
        return Connection(self._served.bounds.patience, partial(self._metrics.refused, "late"), **made)

    def _begin(self) -> None:
        try:
            self._served.begin(self._load())
        except BaseException as error:
            self.failed, self.should_exit = error, True
            return
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, and at the second signal end at once."""
        self._signals += 1
        if self._signals > 1:
            self.force_exit = self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._ending = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        self._served.stop()
        await asyncio.to_thread(self._served.engine.wait_until_idle, self._grace)
        self.should_exit = True


def serve(
    served: Served,
    load: Callable[[], MemoryModel],
    listening: socket.socket,
    *,
    ready: Callable[[], None],
    grace: float,
    tls: tuple[Path, Path] | None = None,
) -> None:
    """Serve until a signal ends it. listening: the socket. Others: see `Server`. Raises what the model cannot be."""
    server = Server(served, load, ready=ready, grace=grace, tls=tls)
    try:
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        served.close()
    if server.failed is not None:
        raise server.failed
