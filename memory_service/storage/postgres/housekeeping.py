"""What is done by itself in a store that several services share. This file owns which of it every service does, and
which the one that has the lease, whose transactions end with the lease; and what has a thread of its own, because it
may take long and nothing else is to wait for it."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from memory_service.domain.clock import SECOND
from memory_service.domain.limits import Limits, Pauses
from memory_service.observe.metrics import DatabaseMetrics
from memory_service.storage.access.ended_keys import EndedKeys
from memory_service.storage.background import Janitor
from memory_service.storage.postgres.clock import StoreClock
from memory_service.storage.postgres.counting import Counting
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.evicting import Evicting
from memory_service.storage.postgres.feed import Feed
from memory_service.storage.postgres.lease import Lease, LeaseLost
from memory_service.storage.postgres.removal import Removal
from memory_service.storage.postgres.rows import bank_rows, change_rows, chunk_rows
from memory_service.storage.sessions.ended import EndedSessions
from memory_service.storage.sessions.windows import SessionWindows

# Chunks of one run of the expiry, and banks whose changes are trimmed in one. The rest is left to the next run.
_MOST, _MOST_BANKS = 50_000, 1000
# Seconds between two looks at old changes, and the age from which on changes are old.
_SELDOM_S, _OLD_S = 10.0, 3600
# Seconds between two looks for objects of windows that no row names.
_SWEPT_S = 3600.0
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Housekeeping:
    """Runs what recurs, in the threads of two janitors.

    held: the database with the changes of the holder of the lease, by which `removal`, `ended_sessions` and
    `ended_keys` change it too.
    """

    held: Database
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
    resting: Callable[[], bool]
    metrics: DatabaseMetrics
    _next: float = field(default_factory=time.monotonic)

    def begin(self, timer: Janitor, clearer: Janitor) -> None:
        """Begin to do what recurs. clearer: the thread of what may take long."""
        every = self.limits.expiry_s
        timer.every(every, self.counting.write)
        timer.every(every, self.clock.keep_mark)
        timer.every(_SELDOM_S, self.feed.look_after)
        timer.every(every, self.as_holder)
        timer.every(self.limits.keys_tidied_s, self.tidy_keys)
        clearer.every(self.limits.cleared_s, self.clear)
        clearer.every(_SWEPT_S, self.sweep_windows)

    def as_holder(self) -> None:
        """Do what one service does, where this is the one."""
        holds = self.lease.take()
        self.metrics.housekeeper.set(holds)
        if holds:
            self._held(self._keep_house)

    def _held(self, task: Callable[[], None]) -> None:
        """Run a task of the holder of the lease; where it loses the lease, the next holder goes on."""
        if not self.lease.epoch:
            return
        try:
            task()
        except LeaseLost:
            self.lease.epoch = 0
            _log.warning("another service keeps house from here on: this one did not renew its lease in time")

    def _keep_house(self) -> None:
        if not self.pauses.leaves_out("expiry"):
            self.expire()
            self.ended_sessions.run()
        if not self.pauses.leaves_out("evictions"):
            self.evicting.resume()
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SELDOM_S
            before = self.clock.clock.now_us() - _OLD_S * SECOND
            self.held.change(partial(change_rows.trim, before=before, most=_MOST_BANKS), durable=False)

    def expire(self) -> None:
        """Remove chunks that have expired by now, with the counts of this service written."""
        now = self.clock.clock.now_us()
        self.counting.write()
        self.pauses.reach("counts written")
        with self.held.read() as connection:
            expired = chunk_rows.expired(connection, now, _MOST)
            banks = {bank_id: bank_rows.get(connection, bank_id) for bank_id in expired}
        for bank_id, chunk_ids in expired.items():
            bank, step = banks[bank_id], self.limits.step_rows
            for begin in range(0, len(chunk_ids) if bank else 0, step):
                assert bank is not None
                self.removal.remove(bank, chunk_ids[begin : begin + step], "chunks_expired")

    def tidy_keys(self) -> None:
        """Remove keys that ended long ago, where this service has the lease."""
        self._held(self.ended_keys.tidy)

    def clear(self) -> None:
        """Go on with deleted banks of which something is left, where this service has the lease, until it rests."""
        self._held(partial(self.removal.clear_all, lambda: not self.resting()))

    def sweep_windows(self) -> None:
        """Remove objects of windows that no row names, where this service has the lease."""
        self._held(self.windows.sweep)
