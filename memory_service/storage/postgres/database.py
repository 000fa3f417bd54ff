"""Connections to the database, and transactions on them. This file owns which transactions are tried again: those that
others have ended, and those whose connection was lost before COMMIT was sent; after that it is not known whether they
were committed, and the error goes up.

Connections commit by themselves, and transactions are begun by hand, so that it is known what was sent. The BEGIN of a
transaction also tells whether a connection of the pool is still one.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from typing import Any, TypeVar, cast

import psycopg
import sqlalchemy as sa
from psycopg import sql
from psycopg.pq import TransactionStatus
from sqlalchemy import URL, Connection, QueuePool, event
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import ConnectionPoolEntry

from memory_service.domain import cancellation
from memory_service.domain.errors import StartError
from memory_service.observe.metrics import DatabaseMetrics
from memory_service.storage.postgres import failures, vectors
from memory_service.storage.postgres.row_security import SETTING

T = TypeVar("T")
Driver = psycopg.Connection[tuple[Any, ...]]
# A statement that was sent, whose rows are read later.
Asked = psycopg.Cursor[tuple[Any, ...]]
# Tries of one transaction, and the longest pause before the second, in seconds; the next ones are twice as long.
_TRIES, _PAUSE_S = 6, 0.01
# Between two interruptions of a call whose caller has gone, in seconds.
_ASK_S = 0.02
# A service that hangs, or whose host is gone, keeps others waiting for its locks so long at most. Statements are
# planned once, whatever their values are: to plan one over all parts of `chunks` takes longer than to run it. Tables
# grow after that, so that no plan may read one from end to end where there is an index.
_OPTIONS = (
    "-c idle_in_transaction_session_timeout=5min -c timezone=UTC"
    " -c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c jit=off"
)
# A host that is gone is noticed in 30 s: while an answer is waited for, and where something was sent. URLs may say
# otherwise, by the same names.
_CONNECTING = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
# The time of the database, in microseconds since 1970: what several services compare goes by it, because their own
# clocks differ, by hours where that of the database has leapt while some of them were up.
NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::int8"
_READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
_LOCK_TENANT = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"
# For whom a connection works, until it is said anew; kept in `Connection.info` under the name of the setting.
_WORK_FOR = f"SELECT set_config('{SETTING}', %s, false)"


class _Pool(QueuePool):
    """A pool that also closes the connections that come back to it after it was disposed of: SQLAlchemy keeps them open
    until the collector finds them."""

    _over = False

    def dispose(self) -> None:
        """Close the connections that are not in use, and each of the others when it comes back."""
        self._over = True
        super().dispose()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        super()._do_return_conn(record)
        if self._over:
            super().dispose()


# SQLAlchemy logs what happens to a pool under the name of its class, which makes this one's lines those of the service.
logging.getLogger(f"{_Pool.__module__}.{_Pool.__name__}").setLevel(logging.WARNING)


class Database:
    """Runs transactions on a database. Threads share it."""

    def __init__(self, url: str, *, durable: bool = True, most: int = 64, patience_s: float = 30.0) -> None:
        """Connect when a connection is needed. url: postgresql://... durable: whether a commit waits for the disk of
        the database, where `change` says nothing of it. most: connections at once, at least 16. patience_s: the seconds
        for which a call waits until one of them is free; then it ends with NOT_SERVING. Errors: StartError for what is
        no URL."""
        failures.register()
        self._metrics = DatabaseMetrics()
        self._durable = durable
        self._guard: Callable[[Connection], None] | None = None
        self._tenant = ""
        self.url: URL = _read(url)
        options = _OPTIONS if durable else f"{_OPTIONS} -c synchronous_commit=off"
        given = self.url.query.get("options")
        if isinstance(given, str):
            options = f"{given} {options}"
        connecting = {name: value for name, value in _CONNECTING.items() if name not in self.url.query}
        self._engine = sa.create_engine(
            self.url,
            isolation_level="AUTOCOMMIT",
            poolclass=_Pool,
            pool_size=16,
            max_overflow=most - 16,
            pool_timeout=patience_s,
            pool_use_lifo=True,  # the one that was used last has its statements prepared
            # Else an error that is logged repeats the values of its statement: texts and metadata of callers.
            hide_parameters=True,
            connect_args={**connecting, "options": options, "application_name": "kvbank"},
        )
        event.listen(self._engine, "connect", lambda driver, _record: vectors.register(driver))

    def guarded(self, guard: Callable[[Connection], None]) -> "Database":
        """Return the same database, in which each change begins with a call of `guard`, and does not happen where that
        raises."""
        guarded = copy(self)
        guarded._guard = guard
        return guarded

    def of(self, tenant: str) -> "Database":
        """Return the same database as one tenant sees it: rows of others are in no answer, and a change that would make
        one ends with an error. "" stands for the store itself, which sees all rows. See `row_security`."""
        own = copy(self)
        own._tenant = tenant
        return own

    def show(self, metrics: DatabaseMetrics) -> None:
        """Count from now on in these instruments."""
        self._metrics = metrics
        metrics.connections.set_function(lambda: cast(QueuePool, self._engine.pool).checkedout())

    @property
    def title(self) -> str:
        """Return the URL as an operator writes it, without its password."""
        return self.url.render_as_string(hide_password=True).replace("+psycopg", "", 1)

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._engine.dispose()

    def renew(self) -> None:
        """Let go of connections that were opened before the tables were there, which do not know their types."""
        self._engine.dispose()

    def ask(self, question: Callable[[Connection], T], *, to_the_end: bool = True) -> T:
        """Return the result of a function whose statements only read, each as a transaction of its own. It is called
        again on another connection where the database had closed the first one, as a restart does with all. Errors:
        Cancelled, when the caller has gone, unless all is to run to the end."""
        with self._counted():
            return self._ask(question, to_the_end)

    def _ask(self, question: Callable[[Connection], T], to_the_end: bool) -> T:
        for last in (False, True):
            connection = self._connected()
            driver = raw(connection)
            try:
                with self._reading(connection, to_the_end=to_the_end):
                    self._work_for_tenant(connection)
                    return question(connection)
            except psycopg.OperationalError:
                if not to_the_end:
                    cancellation.check()  # where the caller has gone, the connection was closed here
                if last or not driver.closed:
                    raise
            self._engine.dispose()
        raise AssertionError

    def one(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        """Return the first row of a statement that only reads; None where it has none."""
        return self.ask(lambda connection: raw(connection).execute(statement, values, binary=True).fetchone())

    @contextmanager
    def look(self) -> Iterator[Connection]:
        """Lend a connection for statements that only read, each of which sees the rows of its own moment. The database
        has answered the caller just now: a connection that it has closed since is not replaced. Errors: Cancelled, when
        the caller has gone."""
        with self._counted():
            connection = self._connected()
        with self._counted(), self._reading(connection, to_the_end=False):
            self._work_for_tenant(connection)
            yield connection

    @contextmanager
    def read(self, *, to_the_end: bool = False) -> Iterator[Connection]:
        """Begin a transaction that reads, and sees the rows as they are at its first statement. Errors: Cancelled, when
        the caller has gone, unless the block is to run to the end."""
        with self._counted():
            connection = self._checked_out(_READ)
        with self._counted(), self._reading(connection, to_the_end=to_the_end):
            yield connection
            raw(connection).execute("COMMIT")

    @staticmethod
    @contextmanager
    def _reading(connection: Connection, *, to_the_end: bool) -> Iterator[None]:
        """Let the statements of the block be interrupted, unless it is to run to the end, and give the connection
        back."""
        interrupting = _Interrupting(raw(connection))
        try:
            with nullcontext() if to_the_end else cancellation.current().of(interrupting):
                yield
        finally:
            interrupting.ended.set()
            if interrupting.done:
                connection.invalidate()  # the interruption may come to the statement of another call
            _give_back(connection)

    def change(
        self,
        operation: Callable[[Connection], T],
        *,
        tenant: str = "",
        durable: bool = True,
        first: Callable[[Connection], object] | None = None,
        last: Callable[[Connection, T], object] | None = None,
    ) -> T:
        """Run an operation in one transaction, and return its result; one that raises has changed nothing. An operation
        has no effect but on rows, because it may be run again.

        tenant: the operations of one tenant come one after the other. durable: whether what was changed outlasts a
        power cut whatever the database was opened for. first: makes statements before the operation, whose results are
        read there, so that they go to the database in one message with the BEGIN. last: makes the last statements, of
        which no result is read, so that they go in one message with the COMMIT; it gets the result of the operation.
        """
        with self._counted():
            for number in range(_TRIES):
                try:
                    return self._change_once(operation, tenant, durable, first, last)
                except _TryAgain as again:
                    if number == _TRIES - 1:
                        raise again.error from None
                self._metrics.repeated.inc()
                time.sleep(random.uniform(0, _PAUSE_S * 2**number))
        raise AssertionError

    def _change_once(
        self,
        operation: Callable[[Connection], T],
        tenant: str,
        durable: bool,
        first: Callable[[Connection], object] | None,
        last: Callable[[Connection, T], object] | None,
    ) -> T:
        connection = self._connected() if first else self._checked_out("BEGIN")
        driver, sent = raw(connection), False
        try:
            if first:
                with driver.pipeline():
                    for statement in self._beginning(connection, "BEGIN"):
                        # Each tenant has its own, of which a hundred would take the places of all that are prepared.
                        driver.execute(statement, prepare=False)
                    first(connection)
            if durable and not self._durable:
                driver.execute("SET LOCAL synchronous_commit = on")
            if tenant:
                driver.execute(_LOCK_TENANT, (tenant,))
            if self._guard is not None:
                self._guard(connection)
            result = operation(connection)
            sent = True
            with nullcontext() if last is None else driver.pipeline():
                if last is not None:
                    last(connection, result)
                ended = driver.execute("COMMIT")
            if ended.statusmessage != "COMMIT":
                raise psycopg.InternalError("a statement of the transaction had failed")
        except (psycopg.Error, DBAPIError) as error:
            if driver.closed:  # as are the others of the pool, after a restart of the database
                self._engine.dispose()
            if failures.passes(error) or (driver.closed and not sent):
                raise _TryAgain(error) from error
            raise
        finally:
            _give_back(connection)
        return result

    @contextmanager
    def lent(self) -> Iterator[Connection]:
        """Lend a connection for as long as the block takes, for statements that are each a transaction."""
        with self._counted():
            connection = self._checked_out("")
            self._work_for_tenant(connection)
        try:
            with self._counted():
                yield connection
        finally:
            _give_back(connection)

    def _checked_out(self, begin: str) -> Connection:
        """Take a connection out of the pool, and send the beginning of a transaction. Connections that the database has
        closed, as a restart does with all, are replaced."""
        connection = self._connected()
        try:
            self._send(connection, begin)
        except psycopg.OperationalError:
            connection.invalidate()
            connection.close()
            self._engine.dispose()
            connection = self._connected()
            self._send(connection, begin)
        return connection

    def _send(self, connection: Connection, begin: str) -> None:
        """Send the beginning of a transaction in one message."""
        raw(connection).execute("; ".join(self._beginning(connection, begin)), prepare=False)

    def _beginning(self, connection: Connection, begin: str) -> list[str]:
        """Return the statements that begin a transaction, which works for the tenant to its end."""
        if not begin or connection.info.get(SETTING, "") == self._tenant:
            return [begin]
        return [begin, sql.SQL("SET LOCAL {} = {}").format(sql.SQL(SETTING), self._tenant).as_string()]

    def _work_for_tenant(self, connection: Connection) -> None:
        """Let a connection that is in no transaction work for the tenant, until the next call of this."""
        if connection.info.get(SETTING, "") != self._tenant:
            raw(connection).execute(_WORK_FOR, (self._tenant,))
            connection.info[SETTING] = self._tenant

    def _connected(self) -> Connection:
        """Take a connection out of the pool, and note how long that took."""
        begun = time.perf_counter()
        try:
            return self._engine.connect()
        finally:
            self._metrics.wait_seconds.observe(time.perf_counter() - begun)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the error of the database by which the block ends, if it does."""
        try:
            yield
        except Exception as error:
            if kind := failures.kind_of(error):
                self._metrics.errors[kind].inc()
            raise


def _read(url: str) -> URL:
    try:
        return sa.make_url(url).set(drivername="postgresql+psycopg")
    except (ArgumentError, ValueError):  # their texts may repeat a password
        text = "the URL of the database cannot be read; it is postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
        raise StartError(f"{text}, with what is special in user and password as %XX") from None


class _TryAgain(Exception):
    """The end of a transaction of which nothing has happened."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class _Interrupting:
    """Interrupts the statement of a connection; implements `memory_service.domain.cancellation.Interruptible`."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.done = False
        self.ended = threading.Event()

    def interrupt(self) -> None:
        """Have the statement of the connection end with an error. This does not wait: a thread asks the database."""
        self.done = True
        threading.Thread(target=self._ask, name="kvbank-cancel", daemon=True).start()

    def _ask(self) -> None:
        with suppress(psycopg.Error):
            while not self.ended.wait(_ASK_S):
                self._driver.cancel_safe(timeout=5.0)


def raw(connection: Connection) -> Driver:
    """Return the driver's connection below one of SQLAlchemy; it is in the same transaction."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    return driver


@contextmanager
def savepoint(connection: Connection) -> Iterator[None]:
    """Take back what the block has changed where it raises."""
    driver = raw(connection)
    driver.execute("SAVEPOINT kvbank")
    try:
        yield
    except BaseException:
        if not driver.closed:
            driver.execute("ROLLBACK TO SAVEPOINT kvbank")
        raise
    driver.execute("RELEASE SAVEPOINT kvbank")


def _give_back(connection: Connection) -> None:
    """Give a connection back to the pool, out of any transaction."""
    if not connection.invalidated:
        driver = raw(connection)
        try:
            if driver.info.transaction_status != TransactionStatus.IDLE:
                driver.execute("ROLLBACK")
        except psycopg.Error:
            connection.invalidate()
        if not connection.invalidated and driver.closed:
            connection.invalidate()
    connection.close()
