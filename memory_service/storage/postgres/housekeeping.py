"""What is done by itself in a store that several services share. This file owns which of it every service does, and
which the one that has the lease: all of that may be done twice, so that a lease that changes hands does no harm."""

import time
from dataclasses import dataclass, field
from functools import partial

from memory_service.domain.clock import SECOND
from memory_service.domain.limits import Limits, Pauses
from memory_service.storage.access.ended_keys import EndedKeys
from memory_service.storage.background import Janitor
from memory_service.storage.postgres.clock import StoreClock
from memory_service.storage.postgres.counting import Counting
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.evicting import Evicting
from memory_service.storage.postgres.feed import Feed
from memory_service.storage.postgres.lease import Lease
from memory_service.storage.postgres.removal import Removal
from memory_service.storage.postgres.rows import bank_rows, change_rows, chunk_rows
from memory_service.storage.sessions.ended import EndedSessions
from memory_service.storage.sessions.windows import SessionWindows

# Chunks of one run of the expiry, and banks whose changes are trimmed in one. The rest is left to the next run.
_MOST, _MOST_BANKS = 50_000, 1000
# Seconds between two looks at deleted banks, and at old changes; and the age from which on changes are old.
_SELDOM_S, _OLD_S = 10.0, 3600


# Seconds between two looks for objects of windows that no row names.
_SWEPT_S = 3600.0


@dataclass(slots=True)
class Housekeeping:
    """Runs what recurs, in the thread of a janitor."""

    database: Database
    clock: StoreClock
    counting: Counting
    feed: Feed
    removal: Removal
    evicting: Evicting
    ended_sessions: EndedSessions
    ended_keys: EndedKeys
    windows: SessionWindows
    limits: Limits
    pauses: Pauses
    lease: Lease
    _next: float = field(default_factory=time.monotonic)

    def begin(self, timer: Janitor) -> None:
        """Begin to do what recurs."""
        every = self.limits.expiry_s
        timer.every(every, self.counting.write)
        timer.every(every, self.clock.keep_mark)
        timer.every(_SELDOM_S, self.feed.look_after)
        timer.every(every, self.as_holder)
        timer.every(self.limits.keys_tidied_s, self._tidy_keys)
        timer.every(_SWEPT_S, self._sweep_windows)

    def as_holder(self) -> None:
        """Do what one service does, where this is the one."""
        if not self.lease.take():
            return
        if not self.pauses.leaves_out("expiry"):
            self.expire()
            self.ended_sessions.run()
        if not self.pauses.leaves_out("evictions"):
            self.evicting.resume()
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SELDOM_S
            self.removal.clear_all()
            before = self.clock.clock.now_us() - _OLD_S * SECOND
            self.database.change(partial(change_rows.trim, before=before, most=_MOST_BANKS), durable=False)

    def expire(self) -> None:
        """Remove chunks that have expired by now, with the counts of this service written."""
        now = self.clock.clock.now_us()
        self.counting.write()
        self.pauses.reach("counts written")
        with self.database.read() as connection:
            expired = chunk_rows.expired(connection, now, _MOST)
            banks = {bank_id: bank_rows.get(connection, bank_id) for bank_id in expired}
        for bank_id, chunk_ids in expired.items():
            bank, step = banks[bank_id], self.limits.step_rows
            for begin in range(0, len(chunk_ids) if bank else 0, step):
                assert bank is not None
                self.removal.remove(bank, chunk_ids[begin : begin + step], "chunks_expired")

    def _tidy_keys(self) -> None:
        if self.lease.epoch:
            self.ended_keys.tidy()

    def _sweep_windows(self) -> None:
        if self.lease.epoch:
            self.windows.sweep()
