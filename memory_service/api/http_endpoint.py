"""The HTTP door beside gRPC: `/metrics` for Prometheus, `/healthz` and `/readyz` for what keeps the service running,
such as systemd or Kubernetes.

It is served in the event loop, so that slow callers cost no thread. This file owns the bounds on how many connections
there are and how long each may take.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from typing import NamedTuple

from prometheus_client.exposition import choose_encoder

from memory_service.domain.errors import StartError
from memory_service.domain.limits import STANDARD, Limits
from memory_service.observe.metrics import Registry
from memory_service.observe.troubles import Troubles

MOST_CONNECTIONS = 64
_LONGEST_HEAD = 8 * 1024
_TEXT = "text/plain; charset=utf-8"


class Answer(NamedTuple):
    """The answer of a path; `kind` is its content type."""

    status: HTTPStatus
    body: bytes
    kind: str = _TEXT


class Endpoint:
    """Answers HTTP requests from `listen` to `close`."""

    def __init__(self, registry: Registry, troubles: Troubles, limits: Limits = STANDARD) -> None:
        self._registry = registry
        self._troubles = troubles
        self._patience = limits.http_patience_s
        # There is one scrape at a time, because each reads the figures of all banks.
        self._scraping = ThreadPoolExecutor(1, "kvbank-metrics")
        self._paths: dict[str, Callable[[str], Awaitable[Answer]]] = {
            "/metrics": self._metrics,
            "/healthz": self._alive,
            "/readyz": self._ready,
        }
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.address = ""

    async def listen(self, listen: str) -> None:
        """Listen at HOST:PORT; `address` then has the port that the system gave, where PORT is 0. Errors:
        StartError."""
        host, _, port = listen.rpartition(":")
        try:
            self._server = await asyncio.start_server(
                self._connected, host.strip("[]"), int(port), limit=_LONGEST_HEAD, reuse_address=True
            )
        except OSError as error:
            raise StartError(f"cannot listen on {listen}: {error.strerror}") from error
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """End all connections, and listen no more."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._scraping.shutdown(wait=False, cancel_futures=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MOST_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            async with asyncio.timeout(self._patience):
                await self._serve(reader, writer)
        except (TimeoutError, OSError, EOFError):
            pass  # the caller has gone, or was too slow
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and say that no other is taken over this connection."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.LimitOverrunError:
            head = ""
        request, _, headers = head.partition("\r\n")
        method, _, target = request.rpartition(" ")[0].partition(" ")
        answer = await self._answer(method, target.partition("?")[0], headers)
        lines = [f"HTTP/1.1 {answer.status} {answer.status.phrase}", f"Content-Type: {answer.kind}"]
        lines += [f"Content-Length: {len(answer.body)}", "Connection: close"]
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            lines.append("Allow: GET, HEAD")
        writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else answer.body))
        writer.write_eof()
        with suppress(OSError):
            await writer.drain()
            # Wait until the caller has closed its end too: an abort before that could lose the answer on its way.
            while await reader.read(_LONGEST_HEAD):
                pass

    async def _answer(self, method: str, path: str, headers: str) -> Answer:
        if not method:
            return _plain(HTTPStatus.BAD_REQUEST, "no request of HTTP")
        if path not in self._paths:
            return _plain(HTTPStatus.NOT_FOUND, f"nothing is here but {', '.join(self._paths)}")
        if method not in ("GET", "HEAD"):
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, "GET or HEAD")
        return await self._paths[path](headers)

    async def _metrics(self, headers: str) -> Answer:
        encode, kind = choose_encoder(_header(headers, "accept"))
        loop = asyncio.get_running_loop()
        try:
            body = await loop.run_in_executor(self._scraping, encode, self._registry)
        except Exception as error:
            return _plain(HTTPStatus.SERVICE_UNAVAILABLE, f"no figures: {type(error).__name__}")
        return Answer(HTTPStatus.OK, body, kind)

    async def _alive(self, _: str) -> Answer:
        return _plain(HTTPStatus.OK, "alive")

    async def _ready(self, _: str) -> Answer:
        ready, troubles = self._troubles.ready(), self._troubles.all()
        lines = ["ready" if ready else "not ready", *(f"{name}: {each.text}" for name, each in troubles.items())]
        return _plain(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, "\n".join(lines))


def _plain(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, f"{text}\n".encode())


def _header(headers: str, name: str) -> str:
    fields = (line.partition(":") for line in headers.split("\r\n"))
    return next((value.strip() for key, _, value in fields if key.strip().lower() == name), "")
