"""One connection of a caller: HTTP, with a bound on the time that a request may take to come.

This file owns what a caller is told who is too slow, or who does not speak HTTP: an error of the same form as all
others, and the end of the connection.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from model_worker.http.errors import ApiError


class Connection(H11Protocol):
    """Serves one connection of a caller to its end.

    patience: seconds for the head of a request, and again for its body. late: called when these are over. gone: set
    when the connection has ended. Others: as uvicorn's `Server` makes its protocols.
    """

    def __init__(self, patience: float, late: Callable[[], object], **made: Any) -> None:
        super().__init__(**made)
        self._late = late
        self.gone = asyncio.Event()
        self._patience = patience
        self._awaited: tuple[Any, Any] = (None, None)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the connection has ended."""
        super().connection_lost(exc)
        self._stop_waiting()
        self.gone.set()

    def shutdown(self) -> None:
        """End the connection behind its answer, where it is not about to end already."""
        if not self.transport.is_closing():
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP. msg: what uvicorn would say."""
        self._refuse(ApiError(400, "the request is no HTTP", code="invalid_request"))

    def _wait(self) -> None:
        """Begin the time of the part of a request that comes now, where another part came before."""
        state = self.conn.their_state
        awaited = (state, self.cycle)
        if awaited == self._awaited and self._timer is not None:
            return
        self._stop_waiting()
        self._awaited = awaited
        if state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._patience, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        """End a connection whose request does not come: without a word where nothing of one came, or it is answered."""
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._late()
            text = f"the request has not come within {self._patience:g} seconds"
            self._refuse(ApiError(408, text, code="request_timeout"))
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """End the connection, with an error as its answer where none has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            unanswered = self.cycle is not None and not self.cycle.response_complete
            bodiless = unanswered and self.cycle.scope["method"] == "HEAD"
            self.transport.write(last_answer(error, self.conn, bodiless=bodiless))
            self.transport.close()
        else:
            self.transport.abort()


def last_answer(error: ApiError, connection: h11.Connection, *, bodiless: bool = False) -> bytes:
    """Return the bytes of an error as the last answer of a connection. bodiless: whether it is one to HEAD."""
    response = error.response()
    headers = [*response.raw_headers, (b"connection", b"close")]
    head = h11.Response(status_code=response.status_code, headers=headers, reason=b"")
    events = [head] if bodiless else [head, h11.Data(data=bytes(response.body))]
    return b"".join(connection.send(each) or b"" for each in events)
