"""The comparison of the bucket with the rows, which one of all services does now and then."""

import logging
from collections.abc import Callable, Sequence

from memory_service.domain.limits import ObjectLimits
from memory_service.domain.model import Bank
from memory_service.storage.base import Vectors
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.lease import Lease
from memory_service.storage.postgres.object_rows import ObjectRows
from memory_service.storage.postgres.store import PostgresStore
from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.objects import S3Objects
from memory_service.storage.s3.orphans import Orphans

# The longest time between two looks at whether a sweep is due, in seconds.
_LOOK_S = 600.0
_log = logging.getLogger(__name__)


class Sweeping:
    """Sweeps the bucket once in each period, whichever service is the first to find that one is due. A sweep that a
    stop or an error ends is not gone on with before the next one is due."""

    def __init__(
        self, database: Database, bucket: Bucket, objects: S3Objects, store: PostgresStore, ended: Callable[[], bool]
    ) -> None:
        """Sweep the bucket of a store. ended: tells that the service rests, which ends a sweep."""
        self._database, self._objects, self._store, self._ended = database, objects, store, ended
        self._limits: ObjectLimits = bucket.limits
        self._orphans = Orphans(bucket, ObjectRows(database, self._lost), store.clock.now_us)
        self.every_s = min(self._limits.sweep_s, _LOOK_S)

    def run(self) -> None:
        """Sweep the bucket where that is due. Errors: those of the bucket and the database."""
        # It is never renewed: its end is when the next sweep is due.
        if not self._ended() and Lease(self._database, "sweep", self._limits.sweep_s).take():
            self._orphans.sweep(lambda: not self._ended())

    def _lost(self, bank_uid: str, chunk_id: int) -> None:
        bank = next((bank for bank in self._store.known_banks() if bank.uid == bank_uid), None)
        if bank is None or not self._objects.there(bank_uid):
            return
        if self._store.set_aside(bank, {chunk_id: "its object is not in the bucket"}):
            _log.error("chunk %d of bank %s has no object, and is quarantined", chunk_id, bank.title)


class CacheFollower:
    """Takes chunks that are gone out of the cache of payloads, whichever service has removed them; implements
    `memory_service.storage.base.Follower`."""

    def __init__(self, objects: S3Objects) -> None:
        self._objects = objects

    def added(self, bank: Bank, ids: Sequence[int], vectors: Vectors) -> None:
        """Do nothing, since a payload comes into the cache when it is read."""

    def removed(self, bank: Bank, ids: Sequence[int]) -> None:
        """Take chunks out of the cache."""
        self._objects.purge(bank.uid, ids)

    def altered(self, bank: Bank, ids: Sequence[int]) -> None:
        """Do nothing, since payloads never change."""

    def changed(self, bank: Bank) -> None:
        """Do nothing, since payloads never change."""

    def dropped(self, bank: Bank) -> None:
        """Take all chunks of a bank out of the cache."""
        self._objects.purge(bank.uid)

    def purge(self, bank: Bank | None) -> int:
        """Return 0, since what is gone was taken out of the cache when it went."""
        return 0
