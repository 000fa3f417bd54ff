"""The one thread that commits. Owns the invariant that a single connection writes and checkpoints the database, and
that committed changes are applied to what is derived from it in commit order.

An operation that refuses (raises) has changed nothing; one that may find out late guards what it does by `savepoint`.
Anything else that fails takes the whole transaction with it.
"""

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, Engine

from memory_service.domain.errors import ServiceError
from memory_service.observe.metrics import Metrics
from memory_service.observe.seldom import Repeating

T = TypeVar("T")
_LARGEST_BATCH = 512
# For which SQLite waits for a lock, as `schema.engine` says it.
BUSY_MS = 30_000
# A transaction takes no more operations after this time, so that nobody waits long for the writer.
_LONGEST_BATCH_S = 0.02
_log = logging.getLogger(__name__)
_failures = Repeating()


class Companion(Protocol):
    """Goes along with every transaction: it writes changes that wait in memory, and keeps memory in step with the
    rows."""

    def pending(self) -> bool:
        """Tell whether changes wait for which a transaction is worth it on its own."""

    def begun(self, connection: Connection) -> None:
        """Write the changes that wait. This is called first in every transaction."""

    def committed(self) -> None:
        """Learn that the transaction that `begun` took part in was committed."""

    def failed(self) -> None:
        """Learn that the transaction that `begun` took part in was not committed."""


@dataclass
class _Job:
    """A job of the writer: `operation` is part of a transaction; where it is None, `action` runs between two of
    them."""

    operation: Callable[[Connection], Any] | None = None
    applied: Callable[[Any], None] | None = None
    action: Callable[[], Any] | None = None
    durable: bool = False
    last: bool = False
    future: "Future[Any]" = field(default_factory=Future)
    value: Any = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        # From here on the future cannot be cancelled: what is submitted is committed.
        self.future.set_running_or_notify_cancel()


_STOP = _Job()


@contextmanager
def savepoint(connection: Connection) -> Iterator[None]:
    """Changes made inside are taken back when the block raises."""
    raw = connection.connection.cursor()
    raw.execute("SAVEPOINT guarded")
    try:
        yield
    except BaseException:
        raw.execute("ROLLBACK TO guarded")
        raise
    finally:
        raw.execute("RELEASE guarded")


class Writer:
    """Group commit: waiting operations go into one transaction.

    `durable`: every commit is on the disk before its futures resolve. Otherwise only those of operations submitted as
    durable are; a power cut may take the commits after the last of them.
    """

    def __init__(
        self, engine: Engine, companion: Companion, metrics: Metrics, *, durable: bool, interval: float = 1.0
    ) -> None:
        """The companion is asked for pending changes every `interval` seconds."""
        self._engine = engine
        # Here and not in the thread, so that a database that cannot be opened is the caller's error.
        self._connection = engine.connect()
        self._companion = companion
        self._metrics = metrics
        self._durable = durable
        self._interval = interval
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        # Nothing comes behind the job that ends the thread, where nobody would ever do it.
        self._closing, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="kvbank-writer", daemon=True)
        self._thread.start()

    def submit(
        self,
        operation: Callable[[Connection], T],
        applied: Callable[[T], None] | None = None,
        *,
        durable: bool = False,
        last: bool = False,
    ) -> "Future[T]":
        """Commit `operation`; then `applied` gets its result, in commit order, before the future resolves.

        `last`: of its transaction, so that the operations behind it know what `applied` did.

        The future tells whether it was committed: an exception of `applied` is a defect, which is logged. Errors by the
        future: those of the operation and of the database; NOT_SERVING after `close`.
        """
        job = _Job(operation=operation, applied=applied, durable=durable and not self._durable, last=last)
        return self._given(job)

    def between(self, action: Callable[[], T]) -> "Future[T]":
        """Run `action` when everything submitted before is committed and applied, and nothing after it is."""
        job = _Job(action=action)
        return self._given(job)

    def _given(self, job: _Job) -> "Future[Any]":
        with self._closing:
            if not self._closed:
                self._jobs.put(job)
                return job.future
        job.future.set_exception(ServiceError("NOT_SERVING", "the service is shutting down"))
        return job.future

    def checkpoint(self) -> "Future[None]":
        """Bring the log into the database, and both files to their sizes, as far as no reader keeps that."""

        def run() -> None:
            # Through the driver: SQLAlchemy would begin a transaction first. Nobody waits for a reader.
            cursor = self._connection.connection.cursor()
            cursor.execute("PRAGMA busy_timeout=0")
            try:
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                cursor.execute(f"PRAGMA busy_timeout={BUSY_MS}")

        return self.between(run)

    def close(self) -> None:
        """Commit what waits and what is pending, checkpoint, close the connection. What is given later is refused."""
        with self._closing:
            self._closed = True
            self._jobs.put(_STOP)
        self._thread.join()

    def _run(self) -> None:
        with self._connection as connection:
            job: _Job | None = None
            while job is not _STOP:
                job = self._wait() if job is None else job
                if job is None or job.operation is not None or job is _STOP:
                    job = self._transaction(connection, job)
                else:
                    self._act(job)
                    job = None
            try:
                # Through the driver: SQLAlchemy would begin a transaction first.
                connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as error:  # a full disk; the next start reads the log
                _log.warning("the log of the database stays beside it: %s", error)
        self._engine.dispose()

    def _wait(self) -> _Job | None:
        try:
            return self._jobs.get(timeout=self._interval)
        except queue.Empty:
            return None

    def _transaction(self, connection: Connection, first: _Job | None) -> _Job | None:
        """Commit `first`, if it is an operation, and those behind it; the job that ended the row of them."""
        batch = [first] if first is not None and first.operation is not None else []
        ended = first if first is _STOP else None
        if not batch and not self._companion.pending():
            return ended
        synced, begun = bool(batch) and batch[0].durable, False
        raw, start = connection.connection.cursor(), time.monotonic()
        try:
            if synced:
                raw.execute("PRAGMA synchronous=FULL")
            with connection.begin():
                begun = True
                self._companion.begun(connection)
                ended = self._fill(connection, batch, synced) or ended
        except Exception as error:
            _failures.error(_log, error, "commit of %d operations failed", len(batch))
            self._metrics.troubles.begin("writing", f"{type(error).__name__}: {getattr(error, 'orig', error)}")
            if begun:
                self._companion.failed()
            for job in batch:
                job.future.set_exception(error)
        else:
            self._companion.committed()
            self._metrics.troubles.end("writing")
            self._metrics.commit_operations.observe(len(batch))
            self._metrics.commit_seconds.observe(time.monotonic() - start)
            for job in batch:
                self._finish(job)
        finally:
            if synced:
                raw.execute("PRAGMA synchronous=NORMAL")
        return ended

    def _fill(self, connection: Connection, batch: list[_Job], synced: bool) -> _Job | None:
        """Execute the first of `batch` and what waits behind it, which joins the batch; the job that cannot join."""
        end = time.monotonic() + _LONGEST_BATCH_S
        for job in batch:
            self._execute(connection, job)
            if job.last or len(batch) == _LARGEST_BATCH or time.monotonic() > end:
                break
            try:
                following = self._jobs.get_nowait()
            except queue.Empty:
                break
            if following.operation is None or (following.durable and not synced):
                return following
            batch.append(following)
        return None

    @staticmethod
    def _execute(connection: Connection, job: _Job) -> None:
        """One refused operation does not spoil the others of its transaction."""
        assert job.operation is not None
        driver: Any = connection.connection.driver_connection
        # Changes that were rolled back count too, so it takes a refusal's word for those.
        before = driver.total_changes
        try:
            job.value = job.operation(connection)
        except ServiceError as refusal:
            job.error = refusal
        except Exception as error:
            if driver.total_changes != before:
                raise
            job.error = error

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
