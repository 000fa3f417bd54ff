"""The seam between the clients and the ways on which calls reach a server.

A client knows what to ask, how often to try and how long; a transport makes one attempt at one call. For each client
there is one over gRPC, and one that asks a plain socket on the server's machine first.
"""

from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any, Protocol


class Transport(Protocol):
    """A way to a server for the blocking client; threads may share it.

    method: name of a method of the service. timeout: seconds that the attempt may take.
    request_id: under which the server logs the call.
    Errors of the calls: grpc.RpcError; ServiceError; ValueError after `close`.
    """

    def unary(self, method: str, request: Any, timeout: float, request_id: str) -> Any:
        """Make a call with one answer, and return it."""

    def stream(self, method: str, request: Any, timeout: float, request_id: str) -> Generator[Any]:
        """Make a call with many answers, and yield them; closing the generator ends the call."""

    def write(self, requests: Iterator[Any], request_id: str) -> Any:
        """Begin a WriteChunks call and return it: iterate over it for the acknowledgements, or `cancel` it. It has no
        deadline of its own, which would end a stream that goes well."""

    def upload(self, method: str, requests: Iterator[Any], timeout: float, request_id: str) -> Any:
        """Begin a call of many requests with one answer and return it: iterate over it for the answer, or `cancel`
        it."""

    def close(self) -> None:
        """Close this way to the server; calls under way fail."""


class AsyncTransport(Protocol):
    """A way to a server for the asyncio client, as `Transport`; it belongs to the running event loop."""

    async def unary(self, method: str, request: Any, timeout: float, request_id: str) -> Any:
        """Make a call with one answer, and return it."""

    def stream(self, method: str, request: Any, timeout: float, request_id: str) -> AsyncGenerator[Any]:
        """Make a call with many answers, and yield them; closing the generator ends the call."""

    async def close(self) -> None:
        """Close this way to the server; calls under way fail."""
