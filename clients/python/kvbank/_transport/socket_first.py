"""Calls that name payload files go over a plain socket where the server has one on this machine, all others over gRPC.

The plain socket answers several times sooner than gRPC. This file owns the rule that whatever cannot be had over it is
asked over gRPC.
"""

from collections.abc import Generator, Iterator
from typing import Any

from kvbank._transport.base import Transport
from kvbank._transport.sharing import Sharing


class SocketFirst:
    """A `Transport` that asks the socket of a shared data folder first, and `otherwise` where that has no answer."""

    def __init__(self, sharing: Sharing, otherwise: Transport) -> None:
        self._sharing = sharing
        self._otherwise = otherwise

    def unary(self, method: str, request: Any, timeout: float, request_id: str) -> Any:
        """Make a call with one answer, and return it."""
        found = self._sharing.ask(method, request, timeout, request_id)
        return self._otherwise.unary(method, request, timeout, request_id) if found is None else found

    def stream(self, method: str, request: Any, timeout: float, request_id: str) -> Generator[Any]:
        """Make a call with many answers, and yield them; closing the generator ends the call."""
        return self._otherwise.stream(method, request, timeout, request_id)

    def write(self, requests: Iterator[Any], request_id: str) -> Any:
        """Begin a WriteChunks call and return it: iterate over it for the acknowledgements, or `cancel` it."""
        return self._otherwise.write(requests, request_id)

    def upload(self, method: str, requests: Iterator[Any], timeout: float, request_id: str) -> Any:
        """Begin a call of many requests with one answer and return it: iterate over it for the answer, or `cancel`
        it."""
        return self._otherwise.upload(method, requests, timeout, request_id)

    def close(self) -> None:
        """Close both ways to the server; calls under way fail."""
        self._sharing.close()
        self._otherwise.close()
