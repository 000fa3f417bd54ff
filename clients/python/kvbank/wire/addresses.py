"""Addresses are checked here and written as gRPC takes them. The service uses this file too."""

import os
from urllib.parse import quote

from kvbank import _arguments

SCHEME = "unix:"


def checked(field: str, address: object) -> str:
    """Check an address; that of a unix socket may have bytes that are no UTF-8. Errors: InvalidArgument."""
    if isinstance(address, str) and address.startswith(SCHEME):
        checked = _arguments.plain(address)
    else:
        checked = _arguments.text(field, address)
    if not checked or "\0" in checked:
        raise _arguments.expected(field, "an address", checked)
    return checked


def for_grpc(address: str) -> str:
    """Quote the path of a unix socket, since gRPC reads an address as a URI: the path may have bytes that are no UTF-8,
    and percent signs of its own."""
    if not address.startswith(SCHEME):
        return address
    return SCHEME + quote(os.fsencode(address.removeprefix(SCHEME)), safe="/:")
