"""Addresses are written here as gRPC takes them, and told apart by whether they leave this machine. The service uses
this file too."""

import ipaddress
import os
from urllib.parse import quote

SCHEME = "unix:"
_OTHER_SCHEMES = ("dns:///", "dns:", "ipv4:", "ipv6:")


def for_grpc(address: str) -> str:
    """Quote the path of a unix socket, since gRPC reads an address as a URI: the path may have bytes that are no UTF-8,
    and percent signs of its own."""
    if not address.startswith(SCHEME):
        return address
    return SCHEME + quote(os.fsencode(address.removeprefix(SCHEME)), safe="/:")


def is_own(address: str) -> bool:
    """Tell whether an address is a unix socket or of the loopback, which no other machine can reach. Of several, in a
    list "HOST:PORT,HOST:PORT", all must be."""
    return address.startswith(SCHEME) or all(map(_is_loopback, address.split(",")))


def _is_loopback(address: str) -> bool:
    for scheme in _OTHER_SCHEMES:
        address = address.removeprefix(scheme)
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
