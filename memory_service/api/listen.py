"""The addresses at which a server listens. This file owns the rule that others reach a server only where its operator
has allowed it, and says why an address cannot be had before gRPC, which only prints the reason, is asked for it.
"""

import os
import shlex
import socket
from pathlib import Path

from kvbank.wire.addresses import is_own
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


def check_tokens(settings: Settings) -> None:
    """Refuse settings of tokens of which one is of no use without another. Errors: StartError."""
    if bool(settings.jwt_jwks) != bool(settings.jwt_audience):
        raise StartError(
            "tokens are checked by their keys and their audience: give both, --jwt-jwks and --jwt-audience"
        )
    if settings.jwt_jwks.startswith("http://") or not (settings.jwt_tenant_claim and settings.jwt_role_claim):
        raise StartError("--jwt-jwks is a file or an https address, and the claims of tenant and role have names")


def check_callers(settings: Settings, known: bool) -> None:
    """Refuse addresses that others can reach while all callers are taken for the owner. known: whether the store has a
    key, or a certificate has a role. Errors: StartError."""
    if settings.insecure or known:
        return
    for address in filter(None, (settings.listen, settings.metrics_listen)):
        if not is_own(address):
            text = f"{address} can be reached by others, and there is no key yet: make one with"
            made = f"`kvbank key create --role operator --memory {shlex.quote(settings.place)}`"
            raise StartError(f"{text} {made}, name clients by --tls-client, or allow it by --insecure")


def left_open(settings: Settings, known: bool) -> list[str]:
    """Return a sentence about each thing that is open to others, which `insecure` has allowed. known: see
    `check_callers`."""
    addresses = filter(None, (settings.listen, settings.metrics_listen))
    found = " and ".join(address for address in addresses if not is_own(address))
    if not found:
        return []
    plain = [] if settings.tls_cert else [f"others can reach {found} without TLS, and read what is sent there"]
    return plain if known else [*plain, f"others can reach {found} without a key, and do what they like"]


def _check_files(settings: Settings) -> None:
    """Refuse files of TLS of which one is of no use without another. Errors: StartError."""
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise StartError("a certificate has a key: give both, --tls-cert and --tls-key")
    if settings.tls_client_ca and not settings.tls_cert:
        raise StartError("clients show a certificate over TLS alone: --tls-client-ca needs --tls-cert and --tls-key")
    if settings.tls_client and not settings.tls_client_ca:
        raise StartError("clients without a certificate have no name: --tls-client needs --tls-client-ca")


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
