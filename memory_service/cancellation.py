"""A caller who has gone: what still works on his call is told, and ends at its next step.

Work in a storage thread asks `check` between its steps; a statement of SQLite that runs meanwhile is interrupted.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Cancellation:
    """Of one call; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._connections: list[sqlite3.Connection] = []

    def cancel(self) -> None:
        """End what works on the call."""
        with self._lock:
            self._cancelled = True
            for connection in self._connections:
                connection.interrupt()

    def check(self) -> None:
        """Errors: Cancelled."""
        if self._cancelled:
            raise Cancelled

    @contextmanager
    def of(self, connection: sqlite3.Connection) -> Iterator[None]:
        """While a connection is used for the call. Errors: Cancelled."""
        with self._lock:
            self.check()
            self._connections.append(connection)
        try:
            yield
        finally:
            with self._lock:  # what uses the connection next is not interrupted
                self._connections.remove(connection)

    def enter(self) -> None:
        """The running task or thread works on the call from here on."""
        _current.set(self)


_current: ContextVar[Cancellation | None] = ContextVar("kvbank_cancellation", default=None)
_NEVER = Cancellation()


def current() -> Cancellation:
    """Of the call that this task or thread works on; one that is never cancelled where it works on none."""
    return _current.get() or _NEVER


def check() -> None:
    """Errors: Cancelled, when the caller has gone."""
    if (cancellation := _current.get()) is not None:
        cancellation.check()
