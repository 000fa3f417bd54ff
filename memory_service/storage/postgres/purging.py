"""What services keep on their own disks of chunks that were forgotten: files of indexes, and payloads. This file owns
that a service drops them soon after another one has forgotten chunks, and that the other waits for that, as long as the
service lives, however long that takes it."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psycopg
from sqlalchemy.exc import DBAPIError

from memory_service.domain.clock import SECOND
from memory_service.domain.errors import ServiceError
from memory_service.storage.followers import Followers
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.feed import Feed
from memory_service.storage.postgres.purged import Note, PurgedCache
from memory_service.storage.postgres.rows import bank_rows, purge_rows
from memory_service.storage.s3.objects import S3Objects

# A service that has not been heard of for so long does not live; another waits so long for it at most, and looks so
# often, in seconds.
_ALIVE_S, _PATIENCE_S, _LOOK_S = 10.0, 120.0, 0.1
# Between two notes on the disk where nothing was forgotten, in microseconds.
_NOTED_US = 3600 * SECOND
_log = logging.getLogger(__name__)


class Purging:
    """Drops what this service keeps of forgotten chunks, and waits for others. Threads share it."""

    def __init__(
        self,
        database: Database,
        feed: Feed,
        followers: Followers,
        objects: S3Objects,
        cache: PurgedCache,
        now: Callable[[], int],
    ) -> None:
        """Begin as a service that has dropped nothing yet. now: the time of the store."""
        self._database, self._feed, self._followers, self._cache = database, feed, followers, cache
        self._objects, self._now = objects, now
        self._service = secrets.token_hex(8)
        self._lock, self._telling = threading.Lock(), threading.Lock()
        self._note = Note(0, 0, 0)

    def begin(self) -> None:
        """Drop what was forgotten while this service was away, before it has an index open. Errors: OSError."""
        # First, so that a service which forgets something from here on waits for this one.
        self.tell()
        note = self._cache.read()
        believed, found = self._told(note)
        if believed and note is not None:
            self._note = note
            for uid in {each.uid for each in found}:
                self._cache.drop_indexes(uid)
                self._objects.purge(uid)
        else:
            self._cache.drop_indexes()
            self._objects.purge_all()
        self._followed(found, always=True)

    def _told(self, note: Note | None) -> tuple[bool, list[purge_rows.Purge]]:
        """Return whether a note can be believed, and the purges behind it; all of them where it cannot."""
        with self._database.read(to_the_end=True) as connection:
            believed = note is not None and note.holds(purge_rows.one(connection, note.number), self._now())
            return believed, purge_rows.after(connection, note.number if believed and note else 0)

    def _followed(self, found: Sequence[purge_rows.Purge], *, always: bool = False) -> None:
        """Note what was dropped, on the disk and for other services. always: also where that was nothing."""
        now = self._now()
        if found or always or now - self._note.seen > _NOTED_US:
            last = found[-1] if found else self._note
            self._note = Note(last.number, last.time, now)
            self._cache.write(self._note)
        self.tell()

    def run(self) -> int:
        """Drop what others have forgotten since the last run, tell so, and return how many files of indexes were made
        anew. Call this every second."""
        with self._lock:
            believed, found = self._told(self._note)
            if not believed:  # the database was put back, and gives numbers again
                self._note = Note(0, 0, 0)
            with self._database.read(to_the_end=True) as connection:
                banks = {each.bank_id: bank_rows.get(connection, each.bank_id) for each in found}
            made = 0
            for bank in filter(None, banks.values()):
                self._feed.catch_up([bank])
                made += self._followers.purge(bank)
            if any(bank is None for bank in banks.values()):
                self._feed.look_after()
                made += self._followers.purge(None)
            for uid in {each.uid for each in found}:
                self._objects.purge(uid)
            self._followed(found, always=not believed)
            return made

    def tell(self) -> None:
        """Tell other services that this one lives, and how far it has come. Call this every second, also while a run
        takes long or fails: what is to be dropped is still there then."""
        with self._telling:  # so that what is told last is the last number
            number, period = self._note.number, round(_ALIVE_S * SECOND)
            self._database.change(
                lambda connection: purge_rows.note(connection, self._service, number, period), durable=False
            )

    def everywhere(self) -> None:
        """Return when all services that live have dropped what was forgotten so far. Errors: NOT_SERVING where one of
        them does not."""
        self.run()
        with self._database.read(to_the_end=True) as connection:
            number = purge_rows.last(connection)
        end = time.monotonic() + _PATIENCE_S
        while self._behind(number):
            if time.monotonic() > end:
                text = "another service on the same store has not dropped yet what it keeps of this; ask again later"
                raise ServiceError("NOT_SERVING", text)
            time.sleep(_LOOK_S)

    def _behind(self, number: int) -> int:
        with self._database.read(to_the_end=True) as connection:
            return purge_rows.behind(connection, number)

    def close(self) -> None:
        """Tell other services that this one has ended, so that none waits for it; where the database does not answer,
        they wait for a few seconds."""
        with suppress(OSError):  # the note of an hour ago is as good
            self._cache.write(self._note._replace(seen=self._now()))
        with suppress(psycopg.Error, DBAPIError):
            self._database.change(lambda connection: purge_rows.leave(connection, self._service))
