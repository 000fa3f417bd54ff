"""Calls that name payload files go over a plain socket where the server has one on this machine, all others over gRPC.

The plain socket answers several times sooner than gRPC. This file owns the rule that whatever cannot be had over it is
asked over gRPC.
"""

import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError

from kvbank._exceptions import DeadlineExceeded
from kvbank._transport import status
from kvbank._transport.base import AsyncTransport, Transport
from kvbank._transport.direct import AsyncDirect, Direct
from kvbank._transport.same_host import SameHost
from kvbank._transport.sharing import Sharing
from kvbank.v1 import direct_pb2

EndT = TypeVar("EndT", Direct, AsyncDirect)
# The methods that a direct call can ask for, and the fields of their requests and answers.
_FIELDS = {"RetrieveFiles": "retrieve", "FetchFiles": "fetch"}


class SocketFirst:
    """A `Transport` that asks the socket of a shared data folder first, and `otherwise` where that has no answer."""

    def __init__(self, sharing: Sharing, otherwise: Transport) -> None:
        self._newest = _Newest(sharing, Direct)
        self._otherwise = otherwise

    def unary(self, method: str, request: Any, timeout: float, request_id: str) -> Any:
        """Make a call with one answer, and return it."""
        found = None
        if (direct := self._newest.end(method)) is not None:
            with _otherwise_after_errors(timeout):
                found = _answer(method, direct.call(_question(method, request, request_id), timeout), request_id)
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
        self._newest.close()
        self._otherwise.close()


class AsyncSocketFirst:
    """An `AsyncTransport` that asks in the same order as `SocketFirst`."""

    def __init__(self, sharing: Sharing, otherwise: AsyncTransport) -> None:
        self._newest = _Newest(sharing, AsyncDirect)
        self._otherwise = otherwise

    async def unary(self, method: str, request: Any, timeout: float, request_id: str) -> Any:
        """Make a call with one answer, and return it."""
        found = None
        if (direct := self._newest.end(method)) is not None:
            with _otherwise_after_errors(timeout):
                found = _answer(method, await direct.call(_question(method, request, request_id), timeout), request_id)
        return await self._otherwise.unary(method, request, timeout, request_id) if found is None else found

    def stream(self, method: str, request: Any, timeout: float, request_id: str) -> AsyncGenerator[Any]:
        """Make a call with many answers, and yield them; closing the generator ends the call."""
        return self._otherwise.stream(method, request, timeout, request_id)

    async def close(self) -> None:
        """Close both ways to the server; calls under way fail."""
        self._newest.close()
        await self._otherwise.close()


class _Newest(Generic[EndT]):
    """The end of the socket in the folder that is shared now. Threads may share it."""

    def __init__(self, sharing: Sharing, made: Callable[[SameHost], EndT]) -> None:
        """Begin without an end. made: makes that of a folder."""
        self._sharing = sharing
        self._made: Callable[[SameHost], EndT] = made
        self._lock = threading.Lock()
        self._folder: SameHost | None = None
        self._end: EndT | None = None

    def end(self, method: str) -> EndT | None:
        """Return the end that a method is asked for at; None where there is none. That of an earlier folder is
        closed."""
        if method not in _FIELDS:
            return None
        with self._lock:
            folder = self._sharing.folder
            if folder is not self._folder:
                self._close()
                self._folder, self._end = folder, self._made(folder) if folder and folder.socket else None
            return self._end

    def close(self) -> None:
        """End every connection, so that calls under way fail."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._end is not None:
            self._end.close()


def _question(method: str, request: Any, request_id: str) -> direct_pb2.DirectRequest:
    return direct_pb2.DirectRequest(request_id=request_id, **{_FIELDS[method]: request})


def _answer(method: str, response: direct_pb2.DirectResponse, request_id: str) -> Any:
    """Return what a response has to say; None where gRPC is to be asked. Errors: the ServiceError that it is."""
    if response.HasField("error"):
        raise status.from_status(response.error, request_id)
    field = _FIELDS[method]
    return getattr(response, field) if response.HasField(field) else None


@contextmanager
def _otherwise_after_errors(timeout: float) -> Iterator[None]:
    """End the block where there is no socket, or no good answer from it. Errors: DeadlineExceeded after `timeout`
    seconds, and all that are of the call."""
    try:
        yield
    except TimeoutError:
        raise DeadlineExceeded(f"no answer within {timeout:.3g} s", code="DEADLINE_EXCEEDED") from None
    except (OSError, DecodeError):
        return
