"""Addresses of unix sockets, as gRPC takes them. The service uses this file too."""

import os
from urllib.parse import quote

from kvbank import _arguments

SCHEME = "unix:"


def checked(field: str, address: object) -> str:
    """An address; that of a socket may have bytes that are no UTF-8. Errors: InvalidArgument."""
    if isinstance(address, str) and address.startswith(SCHEME):
        checked = _arguments.plain(address)
    else:
        checked = _arguments.text(field, address)
    if not checked or "\0" in checked:
        raise _arguments.expected(field, "an address", checked)
    return checked


def for_grpc(address: str) -> str:
    """An address with its path as a URI has it, since gRPC reads it as one; a path may be bytes that are no UTF-8, and
    has a percent sign where its name has one."""
    if not address.startswith(SCHEME):
        return address
    return SCHEME + quote(os.fsencode(address.removeprefix(SCHEME)), safe="/:")
