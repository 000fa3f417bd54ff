"""How far a run is, by updates or by the clock, and the learning rate that follows from it."""

import math
import time
from collections.abc import Callable

FLOOR = 0.03  # of the rate, at the end
SCHEDULES = ("cosine", "constant", "half")


class Pace:
    """A measure of how much of a run is done, by updates or by the clock, whichever is further."""

    def __init__(self, minutes: float | None):
        self._limit = None if minutes is None else 60 * minutes
        self._began = time.monotonic()

    def share(self, step: int, steps: int) -> float:
        """Return the share of the run that is done at `step` of `steps` updates, in [0, 1]."""
        by_clock = 0.0 if self._limit is None else self.seconds / self._limit
        return min(max(step / max(steps, 1), by_clock), 1.0)

    @property
    def seconds(self) -> float:
        """Return the seconds since this start of the run."""
        return time.monotonic() - self._began


def factor_of(schedule: str, warm_up: int, share: Callable[[int], float], step: int) -> float:
    """Return the factor on the learning rate after `step` updates: it rises while warming up, then falls.

    schedule: `cosine` to 3 % of the rate, `constant`, or `half`: constant, and in the last half of the run linear to
    3 %. warm_up: updates. share: gives the share of the run that is done at a step.
    """
    rising = min((step + 1) / warm_up, 1.0) if warm_up else 1.0
    if schedule == "constant":
        return rising
    done = share(step)
    if schedule == "half":
        return min(rising, max(FLOOR, min(1.0, 2 * (1 - done))))
    return min(rising, FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))
