"""The addresses at which a server listens. This file owns the rule that others reach a server only where its operator
has allowed it, and says why an address cannot be had before gRPC, which only prints the reason, is asked for it.
"""

import os
import socket
from pathlib import Path

from memory_service.domain.errors import StartError
from memory_service.settings import LONGEST_SOCKET_PATH, Settings

_LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:")


def check(settings: Settings) -> None:
    """Refuse settings whose addresses cannot be had, or that others can reach without leave. Errors: StartError."""
    _check_reach(settings.listen, settings.insecure)
    if settings.same_host and not settings.listen.startswith("unix:"):
        raise StartError(f"same_host needs a unix socket; {settings.listen} is none")
    if settings.metrics_listen:
        if settings.metrics_listen.startswith("unix:"):
            raise StartError("metrics are served at HOST:PORT, not on a unix socket")
        _check_reach(settings.metrics_listen, settings.insecure)


def _check_reach(listen: str, insecure: bool) -> None:
    """Refuse an address that cannot be had, and one that others can reach unless `insecure`. Errors: StartError."""
    _check_address(listen)
    if not insecure and not listen.startswith(_LOOPBACK):
        text = f"{listen} can be reached by others and there is no authentication yet; allow it with"
        raise StartError(f"{text} --insecure, or listen on 127.0.0.1 or a unix socket")


def _check_address(listen: str) -> None:
    """Refuse an address that cannot be had, with the reason; a port over 65535 too, which gRPC takes modulo 65536.
    Errors: StartError."""
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        if not path.parent.is_dir() or len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
            why = f"its folder must exist, and its path have at most {LONGEST_SOCKET_PATH} bytes"
            raise StartError(f"cannot listen on {listen}: {why}")
    else:
        _check_port(listen)


def _check_port(listen: str) -> None:
    """Refuse a HOST:PORT that this machine does not have, or at which another process listens. Errors: StartError."""
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
