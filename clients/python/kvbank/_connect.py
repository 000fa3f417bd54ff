"""Clients are made here for what `connect` takes; a folder is served by a service inside this process."""

import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar, Unpack

from kvbank import _api_key, _tls
from kvbank._async_client import AsyncClient
from kvbank._client import Client
from kvbank._exceptions import InvalidArgument, MissingExtra, Unavailable
from kvbank._options import ConnectOptions
from kvbank._switches import SPREAD, switch
from kvbank._targets import parse_target
from kvbank._transport import channel

T = TypeVar("T")

# sockaddr_un of Linux has 108 bytes, that of others 104, with the NUL at the end.
LONGEST_SOCKET_PATH = 103


def connect(
    target: str | os.PathLike[str], *, timeout: float = channel.DEFAULT_TIMEOUT, **options: Unpack[ConnectOptions]
) -> Client:
    """Return a client of a memory service, or of a folder.

    target: in this order,
        a path object: a folder;
        "unix:PATH" (also "dns:...", "ipv4:...", "ipv6:..."): an address;
        a string with a path separator, "." or "..", or the name of an existing folder: a folder, made if needed;
        "host:port": an address; "host:port,host:port": several of one service.
    timeout: default deadline of single calls, seconds.
    options: stream_timeout, options, mapped, first_contact, tls, root_certificates, client_certificate, client_key,
        server_name, metadata, api_key, spread; see `ConnectOptions`.

    An address is not contacted before the first call. A folder is served by this process, on a socket that only this
    user can reach, until the client is closed.
    Errors: InvalidArgument; MissingExtra for a folder without `pip install 'kvbank[server]'`; Unavailable, with the
    reason FOLDER_IN_USE, when another process has the folder; `metadata["since"]` changes each time that it is taken.
    """
    return _opened(Client, target, timeout=timeout, **options)


def connect_async(
    target: str | os.PathLike[str], *, timeout: float = channel.DEFAULT_TIMEOUT, **options: Unpack[ConnectOptions]
) -> AsyncClient:
    """Return a client for asyncio, as `connect` does. It is no coroutine: opening a folder blocks until its service
    has started."""
    return _opened(AsyncClient, target, timeout=timeout, **options)


def _opened(kind: Callable[..., T], target: str | os.PathLike[str], **options: Any) -> T:
    """Return a client of this kind; where its options are refused, stop again what was started for it."""
    address, stop = _open(target)
    try:
        if stop is None:
            options = _tls.with_environment(address, options)
            if options.get("api_key") is None:
                options["api_key"] = _api_key.of_environment()
            if options.get("spread") is None:
                options["spread"] = switch(SPREAD) or False
        return kind(address, on_close=stop, **options)
    except BaseException:
        if stop is not None:
            stop()
        raise


def _open(target: str | os.PathLike[str]) -> tuple[str, Callable[[], None] | None]:
    parsed = parse_target(target)
    if isinstance(parsed, str):
        return parsed, None
    stack = ExitStack()
    try:
        server = stack.enter_context(_serve(parsed, _private_address(stack)))
    except BaseException:
        stack.close()
        raise
    return server.address, stack.close


def _private_address(stack: ExitStack) -> str:
    """Return the address of a socket in a folder that only this user may enter; where there can be none, that of a port
    of the loopback. stack: removes the folder."""
    if not hasattr(socket, "AF_UNIX"):
        return "127.0.0.1:0"
    # Not where there are no such sockets, and no locks of this kind.
    from kvbank._transport import socket_folders

    for parent in (tempfile.gettempdir(), "/tmp"):
        try:
            folder = socket_folders.made(parent, stack)
        except OSError:
            continue
        path = os.path.join(folder, socket_folders.SOCKET)
        if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
            return f"unix:{path}"
    return "127.0.0.1:0"


def _serve(folder: Path, address: str) -> Any:
    try:
        from memory_service.api.embedded import LocalServer
        from memory_service.domain.errors import FolderInUse, StartError
    except ModuleNotFoundError as error:
        needs = f"opening a folder needs the server (no module {error.name!r})"
        raise MissingExtra(f"{needs}: pip install 'kvbank[server]'") from None
    try:
        return LocalServer(folder, listen=address, same_host=address.startswith("unix:"))
    except FolderInUse as error:
        raise Unavailable(
            str(error), reason="FOLDER_IN_USE", metadata={"folder": str(folder), "since": str(error.since)}
        ) from None
    except StartError as error:
        raise Unavailable(str(error)) from None
    except ValueError as error:  # SettingsError: of a KVBANK_* variable
        raise InvalidArgument(f"cannot serve {folder}: {error}", reason="INVALID_FIELD") from None
