"""The cancellation of calls. This file owns that the work on a call whose caller has gone ends at its next step.

Work in a storage thread asks `check` between its steps; a statement of a database that runs meanwhile is interrupted.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Cancelled(Exception):
    """The error that ends the work on a call whose caller does not wait for an answer any more."""


class Interruptible(Protocol):
    """A connection to a database that another thread may be using for the call."""

    def interrupt(self) -> None:
        """Let the statement that runs on the connection raise an error."""


class Cancellation:
    """Tells all work on one call that its caller has gone. Threads may share a cancellation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._connections: list[Interruptible] = []

    def cancel(self) -> None:
        """End the work on the call: interrupt its statements, and let each `check` raise."""
        with self._lock:
            self._cancelled = True
            for connection in self._connections:
                connection.interrupt()

    def check(self) -> None:
        """Go on while the caller is there. Errors: Cancelled."""
        if self._cancelled:
            raise Cancelled

    @contextmanager
    def of(self, connection: Interruptible) -> Iterator[None]:
        """Let `cancel` interrupt a connection while the block uses it for the call. Errors: Cancelled."""
        with self._lock:
            self.check()
            self._connections.append(connection)
        try:
            yield
        finally:
            with self._lock:  # what uses the connection next is not interrupted
                self._connections.remove(connection)

    def enter(self) -> None:
        """Make this the cancellation that `check` asks in the running task or thread from here on."""
        _current.set(self)


_current: ContextVar[Cancellation | None] = ContextVar("kvbank_cancellation", default=None)
_NEVER = Cancellation()


def current() -> Cancellation:
    """Return the cancellation of the call that this task or thread works on; where it works on none, one that is never
    cancelled."""
    return _current.get() or _NEVER


def check() -> None:
    """Go on while the caller, if there is one, waits for the answer. Errors: Cancelled."""
    if (cancellation := _current.get()) is not None:
        cancellation.check()
