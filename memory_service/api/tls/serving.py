"""The identity in service, for gRPC and for HTTP. This file owns that it is renewed while the service runs: every new
connection is served by the files as they are then, and while they are not fit to be served, by what was served before.

The files are read anew for each connection, which costs less than a tenth of its handshake: a time of change can stay
the same where a file is written twice.
"""

import logging
import ssl
import stat
import threading
from datetime import UTC, datetime
from typing import Any

import grpc

from memory_service.api.tls import clients
from memory_service.api.tls.identity import Files, Identity, Pem, UnfitError, checked, moment
from memory_service.domain.errors import StartError
from memory_service.observe.troubles import Troubles

# The name of the trouble for files that cannot be served.
_UNFIT = "tls"
_log = logging.getLogger(__name__)


class Tls:
    """Serves TLS by files that may change. Threads share it: gRPC asks in threads of its own."""

    def __init__(self, files: Files, troubles: Troubles) -> None:
        """Read the files for the first time. Errors: StartError."""
        self._files, self._troubles = files, troubles
        self._lock = threading.Lock()
        try:
            self._identity = checked(files, files.read(), _now())
            self._context = self._made()
        except UnfitError as error:
            raise StartError(f"no TLS: {error}") from None
        if files.key.stat().st_mode & stat.S_IROTH:
            _log.warning("%s can be read by other users of this machine: chmod 600", files.key)
        # The bytes that gRPC was given last.
        self._given: Pem | None = None

    @property
    def identity(self) -> Identity:
        """Return what is served by at this moment."""
        return self._identity

    @property
    def wants_certificates(self) -> bool:
        """Tell whether clients are asked for a certificate."""
        return self._files.authorities is not None

    def look(self) -> Identity:
        """Read the files, take them into service where they have changed and are fit, and return what is in service.
        That they are unfit is logged once, and told as a trouble until they are fit."""
        with self._lock:
            try:
                if (found := self._files.read()) != self._identity.pem:
                    self._renew(checked(self._files, found, _now()))
                self._troubles.end(_UNFIT)
            except UnfitError as error:
                self._troubles.begin(_UNFIT, f"the certificate before is served on: {error}")
            return self._identity

    def _renew(self, identity: Identity) -> None:
        """Serve by this identity. Errors: UnfitError."""
        self._context, self._identity = self._made(), identity
        _log.info("%s was renewed; it is valid until %s", self._files.certificate, moment(identity.expires))

    def for_grpc(self) -> Any:
        """Return the credentials of a port of gRPC, which asks for the newest certificate at each connection."""
        self._given = self._identity.pem
        initial = _configuration(self._given)
        return grpc.dynamic_ssl_server_credentials(initial, self._newest, self.wants_certificates)

    def _newest(self) -> Any:
        """Return the configuration of a new connection, or None where it is that of the one before."""
        found = self.look().pem
        if found == self._given:
            return None
        self._given = found
        return _configuration(found)

    def trusts(self, shown: bytes) -> bool:
        """Tell whether the client of a connection that is open could connect once more by the certificate that it has
        shown. shown: PEM, with the certificates that this one was signed by."""
        authorities = self._identity.pem.authorities
        return authorities is None or _now().timestamp() < clients.valid_until(shown, authorities)

    def for_http(self) -> ssl.SSLContext:
        """Return the context of a new connection over HTTP."""
        self.look()
        return self._context

    def _made(self) -> ssl.SSLContext:
        """Make the context of the files. A client of HTTP may come without a certificate, because who asks for the
        health seldom has one. Errors: UnfitError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # Python takes no bytes here; where the files have changed since they were read, the next look sees it.
            context.load_cert_chain(self._files.certificate, self._files.key, password="")
            if self._files.authorities is not None:
                context.verify_mode = ssl.CERT_OPTIONAL
                context.load_verify_locations(self._files.authorities)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise UnfitError(f"{self._files.certificate} cannot be served: {reason}") from None
        return context


def _configuration(pem: Pem) -> Any:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.authorities)


def _now() -> datetime:
    return datetime.now(UTC)
