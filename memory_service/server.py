"""Build, start, stop. Owns the data folder's lock and the order of a clean shutdown."""

import asyncio
import fcntl
import logging
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from sqlalchemy.exc import DBAPIError

from kvbank.v1 import service_pb2, service_pb2_grpc
from memory_service.bank import Banks
from memory_service.errors import StartError
from memory_service.payloads import sync_folder
from memory_service.service import MemoryService
from memory_service.settings import Settings

SERVICE = service_pb2.DESCRIPTOR.services_by_name["MemoryService"].full_name
LONGEST_SOCKET_PATH = 107
_LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:")
_log = logging.getLogger(__name__)


class DataFolder:
    """The data folder, owned by one process at a time."""

    def __init__(self, path: Path) -> None:
        """Errors: StartError when another server owns it or it cannot be written."""
        try:
            _make_durable(path)
            self._lock = open(path / "kvbank.lock", "a+")  # noqa: SIM115
        except OSError as error:
            why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
            raise StartError(f"cannot use {path} as data folder: {why}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise StartError(f"{path} is in use by {owner}; one server owns a data folder") from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()}\n")
        self._lock.flush()

    def release(self) -> None:
        """Let another server have it, also where a forked child still has the file open."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()


def _make_durable(folder: Path) -> None:
    """Make a folder; each new level is an entry in its parent, and as durable as that."""
    missing = [level for level in (folder, *folder.parents) if not level.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for level in missing:
        sync_folder(level.parent)


class Server:
    """A serving memory service; made by `start`, used in the event loop that made it."""

    def __init__(self, settings: Settings) -> None:
        """Open the data folder. Errors: StartError."""
        _check_address(settings.listen)
        if not settings.insecure and not settings.listen.startswith(_LOOPBACK):
            text = f"{settings.listen} can be reached by others and there is no authentication yet; allow it with"
            raise StartError(f"{text} --insecure, or listen on 127.0.0.1 or a unix socket")
        self._settings = settings
        self._folder = DataFolder(settings.data)
        try:
            self._banks = Banks(settings)
        except BaseException as error:
            self._folder.release()
            if isinstance(error, OSError | DBAPIError):
                raise StartError(f"cannot open {settings.data}: {error}".splitlines()[0]) from error
            raise
        self._pool = ThreadPoolExecutor(settings.storage_threads, "kvbank-storage")
        self._service = MemoryService(self._banks, settings, self._pool)
        self._health = health.aio.HealthServicer()
        self.address = ""

    async def start(self) -> None:
        """Bind and serve; `address` is then what clients connect to. Errors: StartError."""
        limit = self._settings.max_message_bytes
        # Without SO_REUSEPORT a second server on the port is an error, not a lottery.
        options = [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.so_reuseport", 0),
        ]
        self._server = grpc.aio.server(options=options)
        service_pb2_grpc.add_MemoryServiceServicer_to_server(self._service, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.address = self._bind()
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def _bind(self) -> str:
        listen = self._settings.listen
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            self._close()
            raise StartError(f"cannot listen on {listen}") from error
        return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"

    async def stop(self) -> None:
        """Health off, nothing new, finish what runs within the grace time, then close the storage."""
        self._service.draining = True
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(self._settings.grace)
        await asyncio.to_thread(self._close)

    async def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)

    def _close(self) -> None:
        self._pool.shutdown()
        self._banks.close()
        self._folder.release()


async def serve(settings: Settings, ready: Any) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is called with the address. Errors: StartError."""
    server = Server(settings)
    await server.start()
    try:
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        ready(server.address)
        await stopping.wait()
    finally:
        await server.stop()


def _check_address(listen: str) -> None:
    """Errors: StartError with the reason; gRPC only prints it, and takes a port modulo 65536."""
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        if not path.parent.is_dir() or len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
            why = f"its folder must exist, and its path have at most {LONGEST_SOCKET_PATH} bytes"
            raise StartError(f"cannot listen on {listen}: {why}")
        return
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise StartError(f"cannot listen on {listen!r}: it is neither HOST:PORT nor unix:PATH")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StartError(f"cannot listen on {listen}: {error.strerror}") from error


class LocalServer:
    """A server in this process, in a thread with a loop of its own.

    `address`: what to connect to. `stop()` or leaving the context ends it. Errors of the constructor: StartError.
    """

    def __init__(self, data: str | Path, listen: str = "127.0.0.1:0", **settings: Any) -> None:
        """`settings`: fields of memory_service.settings.Settings."""
        self._settings = Settings(data=Path(data), listen=listen, **settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvbank-server", daemon=True)
        self._thread.start()
        try:
            self._server: Server | None = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise
        self.address = self._server.address

    async def _start(self) -> Server:
        server = Server(self._settings)
        await server.start()
        return server

    def stop(self) -> None:
        """Finish what runs, close the folder. A second call does nothing."""
        server, self._server = self._server, None
        if server is not None:
            asyncio.run_coroutine_threadsafe(server.stop(), self._loop).result()
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "LocalServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
