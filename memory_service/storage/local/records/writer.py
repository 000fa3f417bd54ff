"""The one thread that commits. This file owns the invariant that a single connection writes and checkpoints the
database, that committed changes are applied in commit order to what is derived from it, and that the tenants whose
operations wait take turns.

An operation that refuses (raises) has changed nothing; one that may find out late guards what it does by `savepoint`.
Anything else that fails takes the whole transaction with it.
"""

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine

from memory_service.domain.errors import ServiceError
from memory_service.domain.limits import NO_PAUSES, Pauses
from memory_service.domain.round_robin import RoundRobin
from memory_service.observe.metrics import Metrics
from memory_service.observe.seldom import Repeating

T = TypeVar("T")
_LARGEST_BATCH = 512
# Milliseconds for which SQLite waits for a lock, as `schema.engine` says it in seconds.
BUSY_MS = 30_000
# A transaction takes no more operations after this time, so that no operation waits long for the writer.
_LONGEST_BATCH_S = 0.02
# Where no operation comes, the companion is asked so often whether changes wait.
_INTERVAL_S = 1.0
_log = logging.getLogger(__name__)
_failures = Repeating()


class Companion(Protocol):
    """What goes along with every transaction: it writes changes that wait in memory, and keeps memory in step with the
    rows."""

    def pending(self) -> bool:
        """Tell whether changes wait for which a transaction is worth it on its own."""

    def begun(self, connection: Connection) -> None:
        """Write the changes that wait. This is called first in every transaction."""

    def committed(self) -> None:
        """Learn that the transaction that `begun` took part in was committed."""

    def failed(self) -> None:
        """Learn that the transaction that `begun` took part in was not committed."""


@dataclass(eq=False, slots=True)
class Operation:
    """A part of a transaction: `run` makes it. After the commit `applied` gets its result, and then `ended`; where it
    was refused, or not committed, `ended` alone is called, with None and the error. `durable` and `last` as in
    `Writer.submit`."""

    run: Callable[[Connection], Any]
    applied: Callable[[Any], None] | None
    ended: Callable[[Any, Exception | None], None]
    durable: bool = False
    last: bool = False
    value: Any = None
    refusal: Exception | None = None

    def execute(self, connection: Connection) -> None:
        """Run the operation, and keep its result, or the error that refuses it and leaves the transaction as it was.
        Errors: those after which the transaction may have half of the operation."""
        driver: Any = connection.connection.driver_connection
        # Changes that were rolled back count too, so a refusal is taken at its word for those.
        before = driver.total_changes
        try:
            self.value = self.run(connection)
        except ServiceError as refusal:
            self.refusal = refusal
        except Exception as error:
            if driver.total_changes != before:
                raise
            self.refusal = error

    def finish(self) -> None:
        """Apply what was committed, and tell it."""
        if self.applied is not None and self.refusal is None:
            try:
                self.applied(self.value)
            except Exception:
                _log.exception("a committed operation could not be applied")
        self.end(self.value, self.refusal)

    def end(self, value: Any, error: Exception | None) -> None:
        """Tell how the operation has ended."""
        try:
            self.ended(value, error)
        except Exception:
            _log.exception("what waits for an operation was not told its end")


@dataclass(eq=False, slots=True)
class _Action:
    """A call between two transactions. `ended` gets its result, or None and its error."""

    call: Callable[[], Any]
    ended: Callable[[Any, Exception | None], None]

    def act(self) -> None:
        """Call the action, and tell its result or its error."""
        try:
            value = self.call()
        except Exception as error:
            self.ended(None, error)
        else:
            self.ended(value, None)


# Operations that were submitted together, in their order, or an action.
_Job: TypeAlias = Sequence[Operation] | _Action


class _Stop:
    """The last job of a writer, which ends its thread."""


class _Jobs:
    """Jobs that wait, of each tenant in the order in which they were given. Any thread puts jobs; the writer's thread
    takes them."""

    def __init__(self) -> None:
        self._lock, self._closed = threading.Lock(), False
        # Each with its tenant.
        self._waiting: RoundRobin[tuple[str, _Job]] = RoundRobin()
        self._tenant = ""
        # One for each job that waits, whichever that is, and one for the end.
        self._signals: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._first: _Job | _Stop | None = None

    def put(self, tenant: str, job: _Job) -> bool:
        """Add a job behind those of its tenant; return False where no job is taken any more."""
        with self._lock:
            if not self._closed:
                self._waiting.put(tenant, (tenant, job))
                self._signals.put(None)
            return not self._closed

    def close(self) -> None:
        """Take no job any more, so that none comes behind the one that ends the thread, where it would never be
        done."""
        with self._lock:
            self._closed = True
            self._signals.put(None)

    def take(self, timeout: float) -> _Job | _Stop | None:
        """Return the next job; None where there is none within `timeout` seconds."""
        if (job := self._first) is not None:
            self._first = None
            return job
        try:
            self._signals.get(timeout=timeout) if timeout else self._signals.get_nowait()
        except queue.Empty:
            return None
        with self._lock:
            if not self._waiting:
                return _Stop()
            self._tenant, job = self._waiting.take()
            return job

    def put_back(self, job: _Job | _Stop) -> None:
        """Let the job that was taken last be the next one again."""
        self._first = job

    def put_back_rest(self, rest: Sequence[Operation]) -> None:
        """Let what is left of the job that was taken last wait before its tenant's others, while other tenants have
        their turns."""
        with self._lock:
            self._waiting.put_first(self._tenant, (self._tenant, rest))
            self._signals.put(None)


@contextmanager
def savepoint(connection: Connection) -> Iterator[None]:
    """Take back the changes that the block makes when it raises."""
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
    """Commits operations in groups: those that wait go into one transaction.

    Where it is `durable`, every commit is on the disk before its futures resolve. Otherwise only the commits of
    operations that are submitted as durable are; a power cut may take those after the last of them.
    """

    def __init__(
        self, engine: Engine, companion: Companion, metrics: Metrics, *, durable: bool, pauses: Pauses = NO_PAUSES
    ) -> None:
        """Open the connection that writes, and begin the thread. Errors: those of a database that cannot be opened."""
        self._engine = engine
        self._connection = engine.connect()
        self._companion = companion
        self._metrics = metrics
        self._durable = durable
        self._pauses = pauses
        self._jobs = _Jobs()
        self._thread = threading.Thread(target=self._run, name="kvbank-writer", daemon=True)
        self._thread.start()

    def submit(
        self,
        operation: Callable[[Connection], T],
        applied: Callable[[T], None] | None = None,
        *,
        tenant: str = "",
        durable: bool = False,
        last: bool = False,
    ) -> "Future[T]":
        """Commit an operation in its turn; then `applied` gets its result, in commit order, before the future resolves.

        tenant: whose operation it is; it comes after those that were submitted for the same tenant before. "" is the
            service itself.
        durable: the commit is on the disk then, also where the writer's others are not. last: the operation is the last
        of its transaction, so that those behind it know what `applied` did.

        The future tells whether it was committed: an exception of `applied` is a defect, which is logged. Errors by the
        future: those of the operation and of the database; NOT_SERVING after `close`.
        """
        future = _begun()
        given = Operation(operation, applied, partial(_settle, future), durable and not self._durable, last)
        self.submit_all([given], tenant=tenant)
        return future

    def submit_all(self, operations: Sequence[Operation], *, tenant: str) -> None:
        """Commit operations of a tenant, one behind the other, as `submit` does. Each is refused or committed on its
        own; a transaction that has taken long leaves the rest of them to the next one."""
        if not self._jobs.put(tenant, operations):
            for operation in operations:
                operation.end(None, _stopping())
        for _ in operations:
            self._pauses.reach("submitted")

    def between(self, action: Callable[[], T], *, tenant: str = "") -> "Future[T]":
        """Run `action` between two transactions, when all that was submitted for the same tenant before is committed
        and applied."""
        future = _begun()
        if not self._jobs.put(tenant, _Action(action, partial(_settle, future))):
            future.set_exception(_stopping())
        return future

    def checkpoint(self) -> "Future[None]":
        """Bring the log into the database, and both files to their sizes, as far as no reader keeps that."""

        def run() -> None:
            # Through the driver: SQLAlchemy would begin a transaction first. No writer waits for a reader here.
            cursor = self._connection.connection.cursor()
            cursor.execute("PRAGMA busy_timeout=0")
            try:
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                cursor.execute(f"PRAGMA busy_timeout={BUSY_MS}")

        return self.between(run)

    def with_empty_log(self, action: Callable[[], object], wait_s: float) -> "Future[bool]":
        """Bring the log into the database, and call `action` between two transactions, when the log is empty; return
        whether it was called. What the connection has read is dropped, so that the action may change unused room in
        the file. wait_s: seconds that readers of the log get."""

        def run() -> bool:
            cursor = self._connection.connection.cursor()
            cursor.execute(f"PRAGMA busy_timeout={round(1000 * wait_s)}")
            try:
                busy, *_ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if busy:
                    return False
                action()
                cursor.execute("PRAGMA shrink_memory").fetchall()
                return True
            finally:
                cursor.execute(f"PRAGMA busy_timeout={BUSY_MS}")

        return self.between(run)

    def vacuum(self) -> "Future[None]":
        """Write the database anew, with a map of its pages, while all operations wait. Errors: those of the
        database."""

        def run() -> None:
            cursor = self._connection.connection.cursor()
            cursor.execute("PRAGMA auto_vacuum=INCREMENTAL")
            cursor.execute("VACUUM")

        return self.between(run)

    def close(self) -> None:
        """Commit what waits and what is pending, checkpoint, close the connection. What is given later is refused."""
        self._jobs.close()
        self._thread.join()

    def _run(self) -> None:
        with self._connection as connection:
            while not isinstance(job := self._jobs.take(_INTERVAL_S), _Stop):
                if isinstance(job, _Action):
                    job.act()
                elif job is not None or self._companion.pending():
                    self._transaction(connection, job or ())
            if self._companion.pending():
                self._transaction(connection, ())
            try:
                # Through the driver: SQLAlchemy would begin a transaction first.
                connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as error:  # a full disk; the next start reads the log
                _log.warning("the log of the database stays beside it: %s", error)
        self._engine.dispose()

    def _transaction(self, connection: Connection, job: Sequence[Operation]) -> None:
        """Commit what waits in memory, the operations of a job, and those behind them."""
        synced, begun, batch = any(operation.durable for operation in job), False, list(job)
        raw, start = connection.connection.cursor(), time.monotonic()
        try:
            if synced:
                raw.execute("PRAGMA synchronous=FULL")
            with connection.begin():
                begun = True
                self._companion.begun(connection)
                self._fill(connection, batch, synced)
        except Exception as error:
            _failures.error(_log, error, "commit of %d operations failed", len(batch))
            self._metrics.troubles.begin("writing", f"{type(error).__name__}: {getattr(error, 'orig', error)}")
            if begun:
                self._companion.failed()
            for operation in batch:
                operation.end(None, error)
        else:
            self._companion.committed()
            self._metrics.troubles.end("writing")
            self._metrics.commit_operations.observe(len(batch))
            self._metrics.commit_seconds.observe(time.monotonic() - start)
            for operation in batch:
                operation.finish()
        finally:
            if synced:
                raw.execute("PRAGMA synchronous=NORMAL")

    def _fill(self, connection: Connection, batch: list[Operation], synced: bool) -> None:
        """Execute the operations of `batch` and those that wait behind it, which join the batch. One that is refused
        does not spoil the others; those for which there is no time leave the batch."""
        end, done = time.monotonic() + _LONGEST_BATCH_S, 0
        while True:
            for operation in batch[done:]:
                operation.execute(connection)
                done += 1
                if operation.last or done == _LARGEST_BATCH or time.monotonic() > end:
                    if left := batch[done:]:
                        del batch[done:]
                        self._jobs.put_back_rest(left)
                    return
            following = self._jobs.take(0)
            if isinstance(following, Sequence) and (synced or not following[0].durable):
                batch += following
                continue
            if following is not None:
                self._jobs.put_back(following)
            return


def _begun() -> "Future[Any]":
    """Make a future that cannot be cancelled: what is submitted is committed."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def _settle(future: "Future[Any]", value: Any, error: Exception | None) -> None:
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def _stopping() -> ServiceError:
    return ServiceError("NOT_SERVING", "the service is shutting down")
