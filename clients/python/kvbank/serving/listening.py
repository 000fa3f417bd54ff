"""A server of HTTP gets the socket that it listens on here.

This file owns the rule that what others can reach is protected: an address that is not of this machine alone needs TLS
and a key of each caller, unless it is allowed as it is.
"""

import socket
from dataclasses import dataclass
from pathlib import Path

from kvbank.console.ending import USAGE, Failed
from kvbank.wire.addresses import is_own


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a server of HTTP listens.

    server: what it is called in errors. listen: HOST:PORT; port 0 is any free one. tls_cert, tls_key: files, both for
    HTTPS. insecure: an address that others can reach may be without TLS and without keys.
    """

    server: str
    listen: str
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False

    @property
    def needs_key(self) -> bool:
        """Tell whether each caller has to bring a key."""
        return not (self.insecure or is_own(self.listen))

    @property
    def own_only(self) -> bool:
        """Tell whether programs of this machine alone are let in, and without a key."""
        return is_own(self.listen) and not self.insecure

    @property
    def tls(self) -> tuple[Path, Path] | None:
        """Return the files of the certificate and of its key; None for HTTP."""
        return None if self.tls_cert is None or self.tls_key is None else (self.tls_cert, self.tls_key)

    @property
    def scheme(self) -> str:
        """Return how a URL of the server begins, `http` or `https`."""
        return "http" if self.tls is None else "https"

    def check(self) -> None:
        """Refuse what is no address, and one that others can reach without TLS. Raises Failed."""
        host, _, port = self.listen.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
            raise Failed(f"--listen {self.listen} is not HOST:PORT", USAGE)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise Failed("a certificate has a key: give both, --tls-cert and --tls-key", USAGE)
        for option, file in (("--tls-cert", self.tls_cert), ("--tls-key", self.tls_key)):
            if file is not None and not file.is_file():
                raise Failed(f"{option}: there is no file {file}", USAGE)
        if self.needs_key and self.tls is None:
            raise Failed(
                f"{self.listen} can be reached by others: give {self.server} a certificate (--tls-cert, --tls-key), "
                "listen on 127.0.0.1, or allow it as it is by --insecure",
                USAGE,
            )

    def socket(self) -> socket.socket:
        """Return a socket that listens at the address. Raises Failed where it cannot be had."""
        host, _, port = self.listen.rpartition(":")
        host = host.strip("[]")
        try:
            family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            return socket.create_server((host, int(port)), family=family)
        except OSError as error:
            raise Failed(f"cannot listen on {self.listen}: {error.strerror}") from None


def address_of(listening: socket.socket) -> str:
    """Return the HOST:PORT at which a socket listens."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def write_address(ready_file: Path, address: str) -> None:
    """Write an address into a file that has it whole as soon as it is there."""
    temporary = ready_file.with_suffix(".tmp")
    temporary.write_text(address + "\n")
    temporary.rename(ready_file)
