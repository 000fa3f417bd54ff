"""The other end of a connection, as gRPC names it ("ipv4:127.0.0.1:4711", "ipv6:%5B::1%5D:4711", "unix:..."). This file
owns which callers are on this machine, and which count as one host."""

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from urllib.parse import unquote


def named(address: Sequence[Any]) -> str:
    """Name the other end of a TCP connection as gRPC does. address: as a socket tells it, empty where it is gone."""
    host, port, *more = address or ("", 0)
    return f"ipv6:[{host}]:{port}" if more else f"ipv4:{host}:{port}"


def is_unix(peer: str) -> bool:
    """Tell whether a caller came over a unix socket, which only the owner of the data folder can reach."""
    return peer.startswith("unix:")


def is_local(peer: str) -> bool:
    """Tell whether a caller came over a unix socket, or over the loopback of this machine."""
    address = _address(peer)
    return is_unix(peer) or (address is not None and address.is_loopback)


def host(peer: str) -> str:
    """Name the host of a caller: its address, or the network of 64 bits that a host of IPv6 has to itself."""
    address = _address(peer)
    if isinstance(address, IPv6Address):
        return str(ip_network((address, 64), strict=False))
    return peer.partition(":")[0] if address is None else str(address)


@lru_cache(1024)
def _address(peer: str) -> IPv4Address | IPv6Address | None:
    """Return the address of a caller; None where that is none of IP."""
    _, _, rest = unquote(peer).partition(":")
    text = rest.rpartition(":")[0].strip("[]")
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
