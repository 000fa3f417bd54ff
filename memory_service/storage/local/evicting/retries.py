"""Evictions that could not be written, such as those of a full disk. This file owns when each is tried again: after a
pause that doubles with every failure. The next write that needs room tries it at once."""

import time

from memory_service.domain.limits import Limits
from memory_service.observe.troubles import Troubles

_TROUBLE = "evictions"


class Retries:
    """Remembers the banks whose eviction could not be written, and notes that as a trouble of the service."""

    def __init__(self, troubles: Troubles, limits: Limits) -> None:
        self._troubles = troubles
        self._limits = limits
        # By bank id: when it is tried again (monotonic), and the pause before that in seconds.
        self._pauses: dict[int, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._pauses)

    def failed(self, bank_id: int) -> None:
        """Note that an eviction of the bank could not be written."""
        last = self._pauses.get(bank_id)
        pause = self._limits.first_pause_s if last is None else min(2 * last[1], self._limits.longest_pause_s)
        self._pauses[bank_id] = (time.monotonic() + pause, pause)
        self._troubles.begin(_TROUBLE, "not written; the next write tries again, and so does the service")

    def well(self, bank_id: int) -> None:
        """Note that an eviction of the bank was written, or is not needed any more."""
        if self._pauses.pop(bank_id, None) is not None and not self._pauses:
            self._troubles.end(_TROUBLE)

    def due(self) -> list[int]:
        """Return the banks whose pause is over."""
        now = time.monotonic()
        return [bank_id for bank_id, (due, _) in list(self._pauses.items()) if due <= now]
