"""The addresses at which a server listens. This file owns the rule that others reach a server only where its operator
has allowed it, and says why an address cannot be had before gRPC, which only prints the reason, is asked for it.
"""

import ipaddress
import os
import shlex
import socket
from pathlib import Path

from memory_service.domain.errors import StartError
from memory_service.settings import LONGEST_SOCKET_PATH, Settings


def check(settings: Settings) -> None:
    """Refuse settings whose addresses cannot be had, or that others can reach without leave. Errors: StartError."""
    if settings.same_host and not settings.listen.startswith("unix:"):
        raise StartError(f"same_host needs a unix socket; {settings.listen} is none")
    if settings.metrics_listen.startswith("unix:"):
        raise StartError("metrics are served at HOST:PORT, not on a unix socket")
    _check_files(settings)
    for address in filter(None, (settings.listen, settings.metrics_listen)):
        _check_address(address)
        if not (settings.insecure or settings.tls_cert or is_own(address)):
            text = f"{address} can be reached by others: give the service a certificate (--tls-cert, --tls-key)"
            raise StartError(f"{text}, listen on 127.0.0.1 or a unix socket, or allow it as it is by --insecure")


def check_keys(settings: Settings, there_are_keys: bool) -> None:
    """Refuse an address that others can reach where neither a key nor a certificate says who they are. Errors:
    StartError."""
    if settings.insecure or there_are_keys or settings.tls_client_ca:
        return
    for address in filter(None, (settings.listen, settings.metrics_listen)):
        if not is_own(address):
            text = f"{address} can be reached by others, and there is no key yet: make one with"
            raise StartError(f"{text} `kvbank key create --role operator --memory {shlex.quote(str(settings.data))}`")


def is_own(address: str) -> bool:
    """Tell whether an address is a unix socket or of the loopback, which no other machine can reach."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_addresses(settings: Settings) -> list[str]:
    """Return the addresses that others can reach without TLS, which `insecure` has allowed."""
    addresses = filter(None, (settings.listen, settings.metrics_listen))
    return [] if settings.tls_cert else [address for address in addresses if not is_own(address)]


def what_is_open(settings: Settings) -> str:
    """Say what `insecure` leaves open to others."""
    found = open_addresses(settings)
    if not found:
        return "it allows nothing here that is not allowed without it"
    return f"others can reach {' and '.join(found)} without TLS, and read what is sent there"


def _check_files(settings: Settings) -> None:
    """Refuse files of TLS of which one is of no use without another. Errors: StartError."""
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise StartError("a certificate has a key: give both, --tls-cert and --tls-key")
    if settings.tls_client_ca and not settings.tls_cert:
        raise StartError("clients show a certificate over TLS alone: --tls-client-ca needs --tls-cert and --tls-key")


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
