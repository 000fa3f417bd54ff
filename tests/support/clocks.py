"""Clocks that a test sets by hand."""

import time

from memory_service.domain.clock import Clock, Timepieces

SECOND = 1_000_000
HOUR = 3600 * SECOND


class Hands:
    """The clocks of a machine, in microseconds; they stand still unless a test moves them."""

    def __init__(self) -> None:
        self.wall = time.time_ns() // 1000
        self.running = self.wall // 2
        self.boot = "the first"

    def clock(self) -> Clock:
        """Return the clock of one more process on this machine."""
        return Clock(Timepieces(lambda: self.wall, lambda: self.running, self.boot))

    def go_on(self, microseconds: int) -> None:
        """Let so much time pass."""
        self.wall += microseconds
        self.running += microseconds

    def set_wall(self, microseconds: int) -> None:
        """Set the wall clock forward, or back."""
        self.wall += microseconds

    def start_again(self, microseconds: int) -> None:
        """Switch the machine off for so long, by its wall clock, and on again."""
        self.wall += microseconds
        self.running, self.boot = SECOND, self.boot + ", and one more"
