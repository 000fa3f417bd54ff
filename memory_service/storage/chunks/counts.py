"""Retrievals that are counted and not written yet. This file owns the rule that each retrieval is written once: with
the next transaction, which begins within a second."""

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from memory_service.domain.clock import Clock
from memory_service.storage.base import Retrievals


class Unwritten(NamedTuple):
    """The retrievals that may not be in the database yet, and the time. It must be made before rows are read: then it
    has every retrieval that the rows lack, and its time has no leap of the clock that they lack."""

    now: int
    pending: Mapping[int, Retrievals]
    taken: Mapping[int, Retrievals]

    def of(self, chunk_id: int) -> Retrievals | None:
        """Return the retrievals of one chunk; None where there are none."""
        pending, taken = self.pending.get(chunk_id), self.taken.get(chunk_id)
        return pending.joined(taken) if pending else taken

    def expired(self, row: Any) -> bool:
        """Tell whether a chunk has expired, where none of these retrievals has renewed it. row: one with `chunk_id`,
        `ttl`, `renew` and `expires`."""
        if row.expires is None or row.expires > self.now:
            return False
        found = self.of(row.chunk_id) if row.renew else None
        return found is None or found.first >= row.expires or found.last + int(row.ttl) <= self.now


class Counts:
    """Holds retrievals by chunk id until they are written. Threads may share this."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: dict[int, Retrievals] = {}
        # On their way into the database.
        self._taken: dict[int, Retrievals] = {}

    def add(self, counted: Mapping[int, Retrievals]) -> None:
        """Add retrievals, by chunk id."""
        with self._lock:
            for chunk_id, new in counted.items():
                self._pending[chunk_id] = new.joined(self._pending.get(chunk_id))

    def take(self) -> Mapping[int, Retrievals]:
        """Take all pending retrievals, to write them; call `settle` or `restore` afterwards."""
        with self._lock:
            self._taken, self._pending = self._pending, {}
        return self._taken

    def settle(self) -> None:
        """Forget the retrievals that were taken, because they are in the database."""
        with self._lock:
            self._taken = {}

    def restore(self) -> None:
        """Count the retrievals that were taken as pending again, because they were not committed."""
        with self._lock:
            taken, self._taken = self._taken, {}
        self.add(taken)

    def unwritten(self) -> Unwritten:
        """Return the retrievals that may not be in the database now, with the time."""
        with self._lock:
            return Unwritten(self._clock.now_us(), self._pending, self._taken)

    @property
    def under_way(self) -> bool:
        """Tell whether some retrievals are taken and not in the database yet."""
        return bool(self._taken)

    def __bool__(self) -> bool:
        return bool(self._pending)
