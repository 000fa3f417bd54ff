"""What services keep on their own disks of chunks that were forgotten: files of indexes, and payloads. This file owns
that a service drops them soon after another one has forgotten chunks, and that the other waits for that, as long as the
service lives."""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psycopg
from sqlalchemy.exc import DBAPIError

from memory_service.domain.clock import SECOND
from memory_service.domain.errors import ServiceError
from memory_service.storage.followers import Followers
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.feed import Feed
from memory_service.storage.postgres.rows import bank_rows, purge_rows
from memory_service.storage.s3.objects import S3Objects

# A service that has not been heard of for so long does not live; another waits so long for it at most, and looks so
# often, in seconds.
_ALIVE_S, _PATIENCE_S, _LOOK_S = 10.0, 120.0, 0.1
_log = logging.getLogger(__name__)


class Purging:
    """Drops what this service keeps of forgotten chunks, and waits for others. Threads share it."""

    def __init__(
        self, database: Database, feed: Feed, followers: Followers, objects: S3Objects, now: Callable[[], int]
    ) -> None:
        """Begin as a service that has dropped nothing yet. now: the time of the store."""
        self._database, self._feed, self._followers = database, feed, followers
        self._objects, self._now = objects, now
        self._service = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._number = 0

    def run(self) -> int:
        """Drop what others have forgotten since the last run, tell so, and return how many files of indexes were made
        anew. Call this every second."""
        with self._lock:
            with self._database.read(to_the_end=True) as connection:
                found = purge_rows.after(connection, self._number)
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
            if found:
                self._number = found[-1].number
            self._tell()
            return made

    def _tell(self) -> None:
        until = self._now() + round(_ALIVE_S * SECOND)
        self._database.change(lambda connection: purge_rows.note(connection, self._service, self._number, until))

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
            return purge_rows.behind(connection, number, self._now())

    def close(self) -> None:
        """Tell other services that this one has ended, so that none waits for it; where the database does not answer,
        they wait for a few seconds."""
        with suppress(psycopg.Error, DBAPIError):
            self._database.change(lambda connection: purge_rows.leave(connection, self._service))
