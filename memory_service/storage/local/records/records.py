"""The database of a data folder, which is the truth of what a store holds. This file owns that it is opened and closed
in the right order, and what goes along with every transaction: the counts of retrievals and the mark of the clock. The
rows are in `bank_rows`, `chunk_rows` and `gone_rows`."""

import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from memory_service.domain import cancellation
from memory_service.domain.clock import MARK_US, SECOND, Clock
from memory_service.domain.limits import NO_PAUSES, Pauses
from memory_service.domain.tenants import DEFAULT_TENANT, Tenant
from memory_service.observe.metrics import Metrics
from memory_service.storage.base import Retrievals
from memory_service.storage.chunks.counts import Counts
from memory_service.storage.local.records import access_rows, clock_rows, failures, schema, tenant_usage
from memory_service.storage.local.records.chunk_ids import ChunkIds, Reservations
from memory_service.storage.local.records.schema import raw
from memory_service.storage.local.records.tables import CHUNKS, STORE
from memory_service.storage.local.records.writer import Writer

T = TypeVar("T")
_log = logging.getLogger(__name__)
LARGEST_TIME = 2**63 - 1
# Seconds after a failure in which readers go by the counts that are written.
_RETRY_S = 1.0


class Mirror(Protocol):
    """What is kept in memory equal to the rows as the writer's transaction sees them. The writer's thread calls it."""

    def counted(self, counts: Mapping[int, Retrievals]) -> None:
        """Learn of retrievals by chunk id that the transaction has just written."""

    def forget_all(self) -> None:
        """Drop everything, because a transaction failed whose changes it may have."""


class Records:
    """Opens the database of a data folder, and reads and writes it."""

    def __init__(
        self,
        data: Path,
        mirror: Mirror,
        *,
        durable: bool,
        metrics: Metrics,
        migrate: bool = False,
        clock: Clock | None = None,
        settle_ids: Callable[[Connection], bool],
        pauses: Pauses = NO_PAUSES,
    ) -> None:
        """Open the database of a folder. clock: the clock to go by, where it is not that of the machine. settle_ids:
        makes sure that the ids that the records say are free were never given; see `given_ids.settle`. Errors:
        StartError."""
        failures.register()
        path = data / "metadata.db"
        schema.prepare(path, data, migrate=migrate)
        self.clock = clock or Clock()
        # The time of the mark in the database (until it has been read, none is written) and of the next one.
        self._marked = self._marking = LARGEST_TIME
        self.counts = Counts(self.clock)
        self._mirror = mirror
        self._pauses = pauses
        # The time (monotonic) of the last transaction that failed.
        self._failed = -_RETRY_S
        level = "FULL" if durable else "NORMAL"
        self._readers = schema.engine(path, synchronous=level, writer=False)
        # How often something was read, about: threads that count at once may count once.
        self.reads = 0
        # Connections of readers that are not in use.
        self._idle: list[Connection] = []
        self.writer = Writer(
            schema.engine(path, synchronous=level, writer=True), self, metrics, durable=durable, pauses=pauses
        )
        try:
            # `new_here`: no version that reserves ids in a file, and marks the folders of payloads, was here before.
            self.store_id, self.new_here = self.writer.submit(partial(self._take_up, settle_ids), durable=True).result()
            self.ids = ChunkIds(self.writer, Reservations(data))
        except BaseException:
            self.close()
            raise

    def _take_up(self, settle_ids: Callable[[Connection], bool], connection: Connection) -> tuple[str, bool]:
        """Take up what an earlier process has left: its time and its ids go on. Where there was none, make what is
        always there. Returns the identity of the store, and
        whether no version that reserves ids in a file has served the folder."""
        self.clock.resume(clock_rows.mark(connection))
        clock_rows.save(connection, mark := self.clock.mark())
        self._marking = mark.now
        _identity(connection)
        access_rows.insert_tenant(connection, Tenant(DEFAULT_TENANT, created=self.clock.now_us()))
        tenant_usage.begin(connection)
        new_here = settle_ids(connection)
        return _identity(connection), new_here

    def of(self, tenant: str) -> "Records":
        """Return the records themselves, since a database of one process keeps no rows from it."""
        return self

    @contextmanager
    def read(self, *, to_the_end: bool = False) -> Iterator[Connection]:
        """Begin a short read transaction on a connection of its own. Errors: Cancelled, when the caller has gone,
        unless the block is to run to the end.

        Connections are kept and begun by hand: SQLAlchemy's pool and its transaction cost as much as ten queries.
        """
        self.reads += 1
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._readers.connect()
        driver = raw(connection)
        try:
            with nullcontext() if to_the_end else cancellation.current().of(driver):
                driver.execute("BEGIN")
                yield connection
        except BaseException:
            # Not kept: a statement that the error's traceback holds open would show the rows of now to those after it.
            connection.invalidate()
            connection.close()
            raise
        if connection.in_transaction():  # SQLAlchemy's, which an expression has begun
            connection.rollback()
        if driver.in_transaction:
            driver.execute("COMMIT")
        self._idle.append(connection)

    def snapshot(self) -> Connection:
        """Open a read transaction that sees the rows as they are now, for another thread to use and close."""
        connection = self._readers.connect()
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("SELECT 1 FROM store")
        return connection

    def change(self, operation: Callable[[Connection], T], *, tenant: str = "", durable: bool = False) -> T:
        """Run an operation in one transaction of the writer; see `storage.transactions.Transactions.change`."""
        return self.writer.submit(operation, tenant=tenant, durable=durable).result()

    def flush_counts(self) -> None:
        """Make every pending count visible."""
        if self.pending() or self.counts.under_way:
            self.writer.submit(lambda _connection: None).result()

    def show_counts(self) -> None:
        """Make every pending count visible, where that can be done: a disk that is full, or fails, keeps no caller from
        reading, and is not tried for every one of them."""
        if time.monotonic() - self._failed > _RETRY_S:
            with suppress(DBAPIError, sqlite3.Error):
                self.flush_counts()

    def follow_wall_clock(self) -> None:
        """Let the time leap where a wall clock that was set stays ahead. What has time to live left keeps that time."""
        if by := self.clock.behind():

            def move(connection: Connection) -> None:
                now = self.clock.now_us()
                clock_rows.move_ends(connection, now, by)
                clock_rows.save(connection, self.clock.mark()._replace(now=now + by))

            # The last of its transaction: those behind it go by the new time.
            self.writer.submit(move, lambda _: self.clock.leap(by), last=True).result()
            _log.warning("the wall clock has been ahead for an hour; the time goes forward by %.0f s", by / SECOND)

    def close(self) -> None:
        """Close all connections, the readers' first: SQLite checkpoints when the last one closes, and that must be the
        writer's."""
        while self._idle:
            self._idle.pop().close()
        self._readers.dispose()
        self.writer.close()

    # What goes along with the writer's transactions

    def pending(self) -> bool:
        """Tell whether counts wait to be written."""
        return bool(self.counts) and not self._pauses.leaves_out("counts")

    def begun(self, connection: Connection) -> None:
        """Write the counts, so that what follows in the transaction sees them."""
        if not self._pauses.leaves_out("counts") and (taken := self.counts.take()):
            made = [{"id": at, "times": it.times, "first": it.first, "last": it.last} for at, it in taken.items()]
            connection.execute(_COUNT, made)
            self._mirror.counted(taken)
        mark = self.clock.mark()
        if mark.now - self._marked >= MARK_US:
            clock_rows.save(connection, mark)
            self._marking = mark.now

    def committed(self) -> None:
        """Forget the counts that were written."""
        self.counts.settle()
        self._marked = self._marking

    def failed(self) -> None:
        """Keep the counts for the next transaction, because nothing of this one happened."""
        self._failed = time.monotonic()
        self.counts.restore()
        self._marking = self._marked
        self._mirror.forget_all()


# A chunk that had expired at the first of its retrievals stays expired, because the index may have dropped it already.
# A chunk that had not expired then lived on, so that the later retrievals found it too. A renewal never shortens a
# life.
_RENEWED = sa.case(
    (
        CHUNKS.c.renew & (CHUNKS.c.expires > sa.bindparam("first")),
        sa.func.max(CHUNKS.c.expires, sa.bindparam("last") + CHUNKS.c.ttl),
    ),
    else_=CHUNKS.c.expires,
)
_COUNT = (
    sa.update(CHUNKS)
    .where(CHUNKS.c.chunk_id == sa.bindparam("id"))
    .values(
        retrieval_count=CHUNKS.c.retrieval_count + sa.bindparam("times"),
        last_retrieved=sa.func.max(sa.func.coalesce(CHUNKS.c.last_retrieved, 0), sa.bindparam("last")),
        expires=_RENEWED,
    )
)


def _identity(connection: Connection) -> str:
    store_id = connection.scalar(sa.select(STORE.c.store_id))
    if store_id is None:
        store_id = secrets.token_hex(16)
        connection.execute(sa.insert(STORE).values(id=1, store_id=store_id, next_chunk_id=1))
    return store_id
