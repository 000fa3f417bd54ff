"""From a target to a client; a folder becomes a service inside this process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbank import _channel
from kvbank._async_client import AsyncClient
from kvbank._client import Client
from kvbank._exceptions import MissingExtra, Unavailable


def connect(target: str | os.PathLike[str], *, timeout: float = _channel.DEFAULT_TIMEOUT, **options: Any) -> Client:
    """Connect to a memory service, or open a folder.

    target: in this order,
        a path object: a folder;
        "unix:PATH" (also "dns:...", "ipv4:...", "ipv6:..."): an address;
        a string with a path separator, "." or "..", or the name of an existing folder: a folder, made if needed;
        "host:port": an address.
    timeout: default deadline of single calls, seconds.
    options: `stream_timeout`, the deadline of calls that move tensors (120 s); `options`, gRPC channel arguments.

    An address is not contacted before the first call. A folder is served by this process, for this and other clients,
    until the client is closed; that needs `pip install 'kvbank[server]'` (MissingExtra). Unavailable when
    another process has the folder.
    """
    address, stop = _open(target)
    return Client(address, timeout=timeout, on_close=stop, **options)


def connect_async(
    target: str | os.PathLike[str], *, timeout: float = _channel.DEFAULT_TIMEOUT, **options: Any
) -> AsyncClient:
    """As `connect`, for asyncio. Not a coroutine: opening a folder blocks until its service has started."""
    address, stop = _open(target)
    return AsyncClient(address, timeout=timeout, on_close=stop, **options)


def _open(target: str | os.PathLike[str]) -> tuple[str, Callable[[], None] | None]:
    parsed = _channel.parse_target(target)
    if isinstance(parsed, str):
        return parsed, None
    server = _serve(parsed)
    return server.address, server.stop


def _serve(folder: Path) -> Any:
    try:
        from memory_service.errors import StartError
        from memory_service.server import LocalServer
    except ModuleNotFoundError as error:
        needs = f"opening a folder needs the server (no module {error.name!r})"
        raise MissingExtra(f"{needs}: pip install 'kvbank[server]'") from None
    try:
        return LocalServer(folder)
    except StartError as error:
        raise Unavailable(str(error)) from None
