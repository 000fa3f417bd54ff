"""The one thread that commits. Owns the invariant that a single connection writes and checkpoints the database, and
that committed changes are applied to what is derived from it in commit order."""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine

T = TypeVar("T")
_LARGEST_BATCH = 512
_log = logging.getLogger(__name__)


@dataclass
class _Job:
    """With `operation` part of a transaction; else `action` runs between two transactions."""

    operation: Callable[[Connection], Any] | None = None
    applied: Callable[[Any], None] | None = None
    action: Callable[[], Any] | None = None
    future: "Future[Any]" = field(default_factory=Future)
    value: Any = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        # From here on the future cannot be cancelled: what is submitted is committed.
        self.future.set_running_or_notify_cancel()


class Writer:
    """Group commit: all waiting operations go into one transaction, a savepoint each.

    `prelude` runs first in every transaction and returns how to undo its memory side if the commit fails (pending
    counts); `wanted` says whether a transaction is worth it with nothing waiting, asked every `interval` seconds.
    """

    def __init__(
        self,
        engine: Engine,
        prelude: Callable[[Connection], Callable[[], None]],
        wanted: Callable[[], bool],
        interval: float = 1.0,
    ) -> None:
        self._engine = engine
        # Here and not in the thread, so that a database that cannot be opened is the caller's error.
        self._connection = engine.connect()
        self._prelude = prelude
        self._wanted = wanted
        self._interval = interval
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvbank-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Callable[[Connection], T], applied: Callable[[T], None] | None = None) -> "Future[T]":
        """Commit `operation`; then `applied` gets its result, in commit order, before the future resolves.

        The future tells whether it was committed: an exception of `applied` is a defect, which is logged.
        """
        job = _Job(operation=operation, applied=applied)
        self._jobs.put(job)
        return job.future

    def between(self, action: Callable[[], T]) -> "Future[T]":
        """Run `action` when everything submitted before is committed and applied, and nothing after it is."""
        job = _Job(action=action)
        self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Commit what waits and what is pending, checkpoint, close the connection."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        with self._connection as connection:
            open_ = True
            while open_:
                batch, last, open_ = self._next()
                if batch or self._wanted():
                    self._commit(connection, batch)
                if last is not None:
                    self._act(last)
            # Through the driver: SQLAlchemy would begin a transaction first.
            connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._engine.dispose()

    def _next(self) -> tuple[list[_Job], _Job | None, bool]:
        """The operations of one transaction, an action to run after it, whether to go on."""
        batch: list[_Job] = []
        try:
            job = self._jobs.get(timeout=self._interval)
            while job is not None and job.operation is not None:
                batch.append(job)
                if len(batch) == _LARGEST_BATCH:
                    return batch, None, True
                job = self._jobs.get_nowait()
        except queue.Empty:
            return batch, None, True
        return batch, job, job is not None

    def _commit(self, connection: Connection, batch: list[_Job]) -> None:
        undo: Callable[[], None] | None = None
        try:
            with connection.begin():
                undo = self._prelude(connection)
                for job in batch:
                    self._execute(connection, job)
        except Exception as error:
            _log.exception("commit of %d operations failed", len(batch))
            if undo is not None:
                undo()
            for job in batch:
                job.future.set_exception(error)
            return
        for job in batch:
            self._finish(job)

    @staticmethod
    def _execute(connection: Connection, job: _Job) -> None:
        """One refused operation does not spoil the others of its transaction."""
        assert job.operation is not None
        connection.exec_driver_sql("SAVEPOINT job")
        try:
            job.value = job.operation(connection)
        except Exception as error:
            job.error = error
            connection.exec_driver_sql("ROLLBACK TO job")
        connection.exec_driver_sql("RELEASE job")

    @staticmethod
    def _finish(job: _Job) -> None:
        if job.error is not None:
            job.future.set_exception(job.error)
            return
        if job.applied is not None:
            try:
                job.applied(job.value)
            except Exception:
                _log.exception("a committed operation could not be applied")
        job.future.set_result(job.value)

    @staticmethod
    def _act(job: _Job) -> None:
        assert job.action is not None
        try:
            job.future.set_result(job.action())
        except Exception as error:
            job.future.set_exception(error)
