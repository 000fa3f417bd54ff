"""The engine of a database and a bucket, which several services may have open at once. This file owns the order in
which the parts begin and end."""

import errno
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psycopg
from sqlalchemy.exc import DBAPIError

from memory_service.domain.clock import Clock
from memory_service.domain.errors import StartError
from memory_service.domain.fair_threads import FairThreads
from memory_service.domain.limits import Limits, Pauses
from memory_service.observe.metrics import Metrics
from memory_service.settings import Settings
from memory_service.storage.access.ended_keys import EndedKeys
from memory_service.storage.access.records import Access
from memory_service.storage.background import Janitor
from memory_service.storage.base import Sizes
from memory_service.storage.chunks.counts import Counts
from memory_service.storage.followers import Followers
from memory_service.storage.forgetting.order import Forgettings
from memory_service.storage.postgres import failures, revising, unfinished
from memory_service.storage.postgres.adding import Adding
from memory_service.storage.postgres.bank_changes import BankChanges
from memory_service.storage.postgres.clock import StoreClock
from memory_service.storage.postgres.counting import Counting
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.evicting import Evicting
from memory_service.storage.postgres.feed import Feed
from memory_service.storage.postgres.forgetting import REMAINS, PostgresChunkForgetting
from memory_service.storage.postgres.housekeeping import Housekeeping
from memory_service.storage.postgres.ids import ChunkIds
from memory_service.storage.postgres.lease import Lease
from memory_service.storage.postgres.purged import PurgedCache
from memory_service.storage.postgres.purging import Purging
from memory_service.storage.postgres.removal import Removal
from memory_service.storage.postgres.rows import receipt_rows
from memory_service.storage.postgres.space import Unbounded
from memory_service.storage.postgres.statements import ACCESS_ROWS, FORGETTING_ROWS, QUOTAS, ROWS
from memory_service.storage.postgres.store import PostgresStore
from memory_service.storage.postgres.sweeping import CacheFollower, Sweeping
from memory_service.storage.postgres.window_objects import WindowObjects
from memory_service.storage.s3.opening import open_bucket, open_objects
from memory_service.storage.sessions.ended import EndedSessions
from memory_service.storage.sessions.records import Sessions
from memory_service.storage.sessions.windows import SessionWindows

# An object of a window that no row names is none that another service is about to keep, after so many seconds.
_WINDOW_GRACE_S = 3600.0
# The errors of a database that does not answer.
_SILENT = (psycopg.Error, DBAPIError)
_log = logging.getLogger(__name__)


class PostgresEngine:
    """Implements `memory_service.storage.base.Engine` for a database with a bucket."""

    def __init__(
        self, settings: Settings, metrics: Metrics, clock: Clock | None, limits: Limits, pauses: Pauses
    ) -> None:
        """Open a database, in which tables are made where there are none. clock: None for that of the database. Errors:
        StartError."""
        self._resting = False
        self._limits, self._pauses = limits, pauses
        self.database = Database(settings.data, durable=settings.durability == "fsync")
        with ExitStack() as opened:
            opened.callback(self.database.close)
            store_id, new = self._opened(settings)
            self._bucket = bucket = open_bucket(settings.objects, limits.objects)
            self._folder = Path(settings.cache or _default_cache()) / "stores" / store_id
            self.cache = self._folder / "indexes"
            try:
                self.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
                self.objects = open_objects(bucket, store_id, self._folder / "payloads", settings.cache_bytes)
            except OSError as error:
                raise StartError(f"cannot use the cache {self._folder}: {error.strerror}") from error
            opened.callback(self.objects.close)
            self.objects.claim(new=new)
            self._clock = StoreClock(self.database, clock)
            self._threads = FairThreads(settings.storage_threads, "kvbank-writer")
            opened.callback(self._threads.close)
            self._janitor = Janitor("kvbank-janitor", metrics.troubles)
            opened.callback(self._janitor.close)
            self._timer = Janitor("kvbank-timer", metrics.troubles)
            opened.callback(self._timer.close)
            # Deleted banks and sweeps may take minutes, for which nothing else is to wait.
            self._clearer = Janitor("kvbank-clearer", metrics.troubles)
            opened.callback(self._clearer.close)
            self._sweeper = Janitor("kvbank-sweeper", metrics.troubles)
            opened.callback(self._sweeper.close)
            # Others wait for it when they forget; they take a service that they do not hear of for one that has ended.
            self._purger = Janitor("kvbank-purger", metrics.troubles)
            opened.callback(self._purger.close)
            self._alive = Janitor("kvbank-alive", metrics.troubles)
            opened.callback(self._alive.close)
            windows = WindowObjects(bucket, self._folder, _WINDOW_GRACE_S)
            self._join(store_id, settings, windows, metrics)
            opened.pop_all()

    def _opened(self, settings: Settings) -> tuple[str, bool]:
        """Make the tables, or check their revision; return the identity of the store, and whether nothing was ever
        written to it. Errors: StartError."""
        revising.opened(self.database, migrate=settings.migrate)
        self.database.ask(lambda connection: unfinished.refuse(connection, self.database.title))
        found = self.database.one("SELECT store_id, NOT EXISTS (SELECT 1 FROM banks) FROM store")
        assert found is not None
        return found[0], found[1]

    def _join(self, store_id: str, settings: Settings, files: WindowObjects, metrics: Metrics) -> None:
        """Make the parts that work on the rows, and the store that joins them."""
        limits, pauses, database, clock = self._limits, self._pauses, self.database, self._clock.clock
        followers = Followers()
        followers.append(CacheFollower(self.objects))
        metrics.show_bucket(self.objects.figures)
        ids = ChunkIds(database, partial(self._threads.submit, ""))
        self._shown = metrics.show_database()
        database.show(self._shown)
        self.feed = Feed(database, followers, ids.forget, self._shown)
        self._counting = Counting(database, Counts(clock), pauses)
        removal = Removal(database, self.feed, self.objects, self._janitor, metrics, limits, pauses, clock.now_us)
        counts, threads = self._counting.counts, self._threads
        self.evicting = Evicting(database, self.feed, removal, counts, threads, limits, pauses)
        self._adding = Adding(database, self.feed, self.evicting, removal, counts, clock, threads, metrics)
        changes = BankChanges(settings.max_banks, settings.max_bank_bytes, database, self.feed, removal, self.evicting)
        self.store = PostgresStore(
            store_id=store_id,
            clock=clock,
            database=database,
            followers=followers,
            feed=self.feed,
            counting=self._counting,
            removal=removal,
            evicting=self.evicting,
            adding=self._adding,
            changes=changes,
            ids=ids,
            threads=threads,
        )
        self.space = Unbounded()
        self.windows = SessionWindows(database, clock, ROWS, QUOTAS, self.space, files, self.later)
        self.access = Access(
            records=database,
            clock=clock,
            rows=ACCESS_ROWS,
            quotas=QUOTAS,
            space=self.space,
            banks=changes,
            windows=self.windows,
            is_going=receipt_rows.is_tenant_going,
        )
        self.sessions = Sessions(
            records=database,
            clock=clock,
            rows=ROWS,
            quotas=QUOTAS,
            space=self.space,
            banks=changes,
            windows=self.windows,
            metrics=metrics,
            most=settings.max_sessions,
        )
        self._sweeping = Sweeping(database, self._bucket, self.objects, self.store, lambda: self._resting)
        cache = PurgedCache(self._folder)
        self._purging = Purging(database, self.feed, followers, self.objects, cache, clock.now_us)
        try:
            self._purging.begin()
        except OSError as error:
            raise StartError(f"cannot drop what was forgotten from {self._folder}: {error.strerror}") from error
        chunks = PostgresChunkForgetting(database, self.objects, removal, self.feed, followers, self._purging)
        self.forgetting = Forgettings(
            database, clock, FORGETTING_ROWS, self.windows, chunks, limits, pauses, remains=REMAINS
        )
        self._housekeeping = self._keeping_house(removal, changes)

    def _keeping_house(self, removal: Removal, changes: BankChanges) -> Housekeeping:
        """Make what keeps house, in which the holder of the lease changes nothing without it."""
        limits = self._limits
        lease = Lease(self.database, "janitor", limits.lease_s)
        held = self.database.guarded(lease.hold)
        sessions = replace(self.sessions, records=held, banks=replace(changes, database=held))
        return Housekeeping(
            held=held,
            clock=self._clock,
            counting=self._counting,
            feed=self.feed,
            removal=replace(removal, database=held),
            evicting=self.evicting,
            ended_sessions=EndedSessions(sessions, limits.step_rows),
            ended_keys=EndedKeys(replace(self.access, records=held), limits),
            windows=self.windows,
            limits=limits,
            pauses=self._pauses,
            lease=lease,
            resting=lambda: self._resting,
            metrics=self._shown,
        )

    def begin(self) -> None:
        """Begin what the engine does by itself; see `Engine.begin`."""
        self.forgetting.resume()
        self._housekeeping.begin(self._timer, self._clearer)
        self._sweeper.every(self._sweeping.every_s, self._sweeping.run)
        self._purger.every(self._limits.expiry_s, self._purging.run)
        self._alive.every(self._limits.expiry_s, self._purging.tell)

    def later(self, task: Callable[[], object]) -> None:
        """Run a task in the background, once; what it raises is logged."""
        self._janitor.later(task)

    def probe(self) -> None:
        """Ask the database and the bucket for something. Errors: OSError, psycopg.Error."""
        self.database.one("SELECT 1")
        if not self.objects.there(""):
            raise FileNotFoundError(errno.ENOENT, "the bucket has no payloads of this store")

    def sizes(self) -> Sizes:
        """Measure the whole database; what is free in it is its own affair."""
        found = self.database.one("SELECT pg_database_size(current_database())")
        return Sizes(0 if found is None else int(found[0]), 0)

    def give_back(self) -> None:
        """Return at once, because the database cleans up by itself (autovacuum)."""

    def rest(self) -> None:
        """End what the engine does by itself; see `Engine.rest`."""
        if self._resting:
            return
        self._resting = True
        # What a bucket does not delete now are orphans: a stop waits for no more tries, whoever makes them.
        self._bucket.close()
        self.forgetting.close()
        self.evicting.closed = True
        self._adding.close()
        self._timer.close()
        self._clearer.close()
        self._purger.close()
        self._alive.close()
        self._threads.close()
        self._threads.left()
        self._write_the_last()
        self._purging.close()
        self._janitor.rest()

    def _write_the_last(self) -> None:
        """Write what only this service knows. Where the database does not answer, that is lost, and the stop goes
        on."""
        try:
            self._counting.write()
            self._housekeeping.lease.give_back()
        except _SILENT as error:
            lost = len(self._counting.counts.unwritten().pending)
            _log.error("the counts of %d chunks are lost: the database answers %s", lost, failures.of_driver(error))

    def close(self) -> None:
        """Let go of everything. An engine that could not be begun, and so does not rest yet, is brought to rest
        first."""
        self.rest()
        self._janitor.close()
        with suppress(*_SILENT):  # the mark of a second ago is as good
            self._clock.keep_mark()
        self.objects.close()
        self._sweeper.close()
        self.database.close()


def _default_cache() -> Path:
    """Return the folder for caches of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvbank"
