"""How a client speaks TLS. This file owns which options and variables count, that a key is never part of an error's
text, and that no API key goes to another machine without TLS unless the caller says so.
"""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from kvbank._arguments import expected, flag, invalid, text
from kvbank._switches import switch
from kvbank.wire import addresses

# Option of `connect` -> the variable that counts where it is not given.
VARIABLES: Mapping[str, str] = {
    "root_certificates": "KVBANK_TLS_CA",
    "client_certificate": "KVBANK_TLS_CLIENT_CERT",
    "client_key": "KVBANK_TLS_CLIENT_KEY",
    "server_name": "KVBANK_TLS_SERVER_NAME",
}
_SWITCH = "KVBANK_TLS"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Tls:
    """What a client speaks TLS by, all of it PEM.

    roots: the authorities of servers; None for those that gRPC trusts by itself. certificate, key: what the client
    shows of itself; None for nothing. server_name: the name that a server's certificate must have, "" for that of its
    address.
    """

    roots: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    server_name: str = ""

    def credentials(self) -> Any:
        """Return the credentials of a channel of gRPC."""
        return grpc.ssl_channel_credentials(self.roots, self.key, self.certificate)

    def options(self) -> list[tuple[str, Any]]:
        """Return the channel arguments that say which name a server's certificate must have."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def with_environment(address: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of `connect`, with those of TLS that are not given taken from the environment. A unix socket has
    no TLS, and a caller who says `tls=False` wants none. Errors: InvalidArgument."""
    found = dict(options)
    if address.startswith("unix:") or options.get("tls") is False:
        return found
    for option, variable in VARIABLES.items():
        if found.get(option) is None and (value := os.environ.get(variable)):
            found[option] = value
    if found.get("tls") is None and (wanted := switch(_SWITCH)) is not None:
        found["tls"] = wanted
        if not wanted:
            found |= dict.fromkeys(VARIABLES)
    return found


def given(address: str, options: Mapping[str, Any], *, keyed: bool) -> Tls | None:
    """Return what TLS is spoken by, by these options of `connect`; None where it is not. Any of the options asks for
    it, unless `tls` is False. keyed: whether a key goes with the calls. Errors: InvalidArgument."""
    others = {option: options[option] for option in VARIABLES if options.get(option) is not None}
    wanted = options.get("tls")
    if not (bool(others) if wanted is None else flag("tls", wanted)):
        if others:
            raise invalid(next(iter(others)), "it is of TLS, which tls=False switches off")
        if wanted is None and keyed and not addresses.is_own(address):
            option = "metadata" if options.get("api_key") is None else "api_key"
            how = "speak TLS (tls=True, KVBANK_TLS=1), or say that others may see it (tls=False, KVBANK_TLS=0)"
            raise invalid(option, f"the key would go to {address} as plain text: {how}")
        return None
    if address.startswith("unix:"):
        raise invalid("tls", "a unix socket has no TLS, because it does not leave this machine")
    roots, certificate, key = (_pem(name, others.get(name)) for name in list(VARIABLES)[:3])
    if (certificate is None) != (key is None):
        missing = "client_key" if key is None else "client_certificate"
        raise invalid(missing, "a client's certificate and its key are given together")
    if roots is not None:
        _check_roots(roots)
    if key is not None and b"ENCRYPTED" in key:
        raise invalid("client_key", "expected a key without a password, got an encrypted one")
    name = others.get("server_name")
    return Tls(roots, certificate, key, "" if name is None else _name(name))


def _name(value: object) -> str:
    name = text("server_name", value)
    if not name or not name.isascii() or not name.isprintable() or " " in name:
        raise expected("server_name", "the name of a server", name)
    return name


def _pem(field: str, value: object) -> bytes | None:
    """Return the bytes of an option: itself, or what is in the file that it names. Errors: InvalidArgument."""
    if value is None:
        return None
    if isinstance(value, bytes):
        data = value
    elif isinstance(value, str | os.PathLike):
        data = _read(field, value)
    else:
        raise expected(field, "the name of a file in PEM, or its bytes", type(value).__name__)
    if b"-----BEGIN " not in data:
        raise invalid(field, "there is nothing in PEM")
    return data


def _read(field: str, value: str | os.PathLike[Any]) -> bytes:
    try:
        path = Path(os.fsdecode(value))
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise invalid(field, f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, TypeError):  # with a NUL, or a path object that has no path
        raise expected(field, "the name of a file", value) from None


def _check_roots(roots: bytes) -> None:
    """Check that there are certificates, because gRPC says nothing of others. Errors: InvalidArgument."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=roots.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        raise invalid("root_certificates", "there is no certificate in PEM, or a damaged one") from None
