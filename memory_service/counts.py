"""Retrievals that are counted and not written yet. Owns the rule that each is written once: with the next transaction,
which begins within a second."""

import threading
from collections.abc import Mapping
from typing import NamedTuple

from memory_service.clock import Clock


class Retrievals(NamedTuple):
    """Of one chunk: how many, and when the first and the last of them was, in microseconds."""

    times: int
    first: int
    last: int

    def joined(self, other: "Retrievals | None") -> "Retrievals":
        """These and some others."""
        if other is None:
            return self
        return Retrievals(self.times + other.times, min(self.first, other.first), max(self.last, other.last))


class Unwritten(NamedTuple):
    """What may not be in the database yet, and the time. Asked for before the rows are read: whatever these do not tell
    is here, and a leap of the clock that they do not know is none for the time either."""

    now: int
    pending: Mapping[int, Retrievals]
    taken: Mapping[int, Retrievals]

    def of(self, chunk_id: int) -> Retrievals | None:
        """Of one chunk."""
        pending, taken = self.pending.get(chunk_id), self.taken.get(chunk_id)
        return pending.joined(taken) if pending else taken


class Counts:
    """Retrievals by chunk id."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: dict[int, Retrievals] = {}
        # On their way into the database.
        self._taken: dict[int, Retrievals] = {}

    def add(self, counted: Mapping[int, Retrievals]) -> None:
        """More retrievals."""
        with self._lock:
            for chunk_id, new in counted.items():
                self._pending[chunk_id] = new.joined(self._pending.get(chunk_id))

    def take(self) -> Mapping[int, Retrievals]:
        """All that is pending; `settle` or `restore` follows."""
        with self._lock:
            self._taken, self._pending = self._pending, {}
        return self._taken

    def settle(self) -> None:
        """What was taken is in the database."""
        with self._lock:
            self._taken = {}

    def restore(self) -> None:
        """What was taken was not committed."""
        with self._lock:
            taken, self._taken = self._taken, {}
        self.add(taken)

    def unwritten(self) -> Unwritten:
        """As of now."""
        with self._lock:
            return Unwritten(self._clock.now_us(), self._pending, self._taken)

    @property
    def under_way(self) -> bool:
        """Whether some are taken and not in the database yet."""
        return bool(self._taken)

    def __bool__(self) -> bool:
        return bool(self._pending)
