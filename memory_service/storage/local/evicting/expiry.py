"""The removal of chunks that have expired. This file owns the promise that they are removed soon after their time; that
none is answered past it is kept by the reads (`chunk_rows.found`, `get`, `page`).

An expired chunk stays so: a retrieval counts as its renewal only if it came before. So what is read here as expired at
a moment, with the counts until then written, can be removed without looking again.
"""

from memory_service.domain.limits import Pauses
from memory_service.storage.local.evicting.removal import Removal
from memory_service.storage.local.known_banks import KnownBanks
from memory_service.storage.local.records import chunk_rows
from memory_service.storage.local.records.records import Records

# Chunks of one run. The rest is left to the next run, so that the end of the service does not wait for all.
_MOST = 50_000


class Expiry:
    """Removes chunks that have expired; a thread of its own runs it every second."""

    def __init__(self, records: Records, known: KnownBanks, removal: Removal, pauses: Pauses) -> None:
        self._records = records
        self._known = known
        self._removal = removal
        self._pauses = pauses

    def run(self) -> None:
        """Remove what has expired by now."""
        now = self._records.clock.now_us()
        self._records.flush_counts()
        self._pauses.reach("counts written")
        with self._records.read() as connection:
            expired = chunk_rows.expired(connection, now, _MOST)
        for bank_id, chunk_ids in expired.items():
            if (bank := self._known.current(bank_id)) is not None:
                self._removal.expire(bank, chunk_ids)
