"""Addresses are written here as gRPC takes them. The service uses this file too."""

import os
from urllib.parse import quote

SCHEME = "unix:"


def for_grpc(address: str) -> str:
    """Quote the path of a unix socket, since gRPC reads an address as a URI: the path may have bytes that are no UTF-8,
    and percent signs of its own."""
    if not address.startswith(SCHEME):
        return address
    return SCHEME + quote(os.fsencode(address.removeprefix(SCHEME)), safe="/:")
