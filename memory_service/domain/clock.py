"""The time of the service. This file owns the rules that this time never goes back, neither in a process nor over a
restart, and that a chunk keeps the time that it has left to live, wherever the machine's wall clock jumps.

Within a process the time advances by a clock that counts from the start of the machine and cannot be set. A start goes
on from the mark that the store keeps: on the same start of the machine by what that clock says has passed since, else
by the wall clock, unless that is behind the mark. So a wall clock that is hours ahead for a moment changes nothing; one
that stays ahead (it was set right after the service had started) is followed after an hour, by a leap, which moves the
times of expiry with it (`clock_rows.move_ends`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SECOND = 1_000_000
# How much older, at most, the mark in the store is than the latest time in a row.
MARK_US = SECOND
# A wall clock is followed that is ahead by more than TOLERANCE_US, and by the same (within it), for STEADY_US.
TOLERANCE_US, STEADY_US = 5 * SECOND, 3600 * SECOND


@dataclass(frozen=True, slots=True)
class Timepieces:
    """The clocks of a machine, in microseconds: `wall` since 1970, which can be set; `running` since the machine was
    started, with the time that it slept; `boot` names that start, "" where the system does not say."""

    wall: Callable[[], int]
    running: Callable[[], int]
    boot: str = ""


class Mark(NamedTuple):
    """A time of the service, with what the clock that cannot be set showed then, and on which start of the machine."""

    now: int
    running: int
    boot: str


def machine() -> Timepieces:
    """Return the clocks of this machine."""
    # Not every system has a clock that goes on while the machine sleeps, or a name of its start.
    source = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return Timepieces(lambda: time.time_ns() // 1000, lambda: time.clock_gettime_ns(source) // 1000, boot)


class Clock:
    """Tells the time of the service, in microseconds since 1970. `resume` is called first, `leap` only by the writer's
    thread, and `now_us` by any thread."""

    def __init__(self, timepieces: Timepieces | None = None) -> None:
        """Begin by the wall clock. timepieces: the clocks to read, those of the machine unless others are given."""
        self._pieces = timepieces or machine()
        self._origin = self._pieces.wall() - self._pieces.running()
        # The microseconds by which the wall clock is ahead, and since when (by the running clock) that is so.
        self._ahead, self._since = 0, self._pieces.running()
        self.leapt = 0

    def now_us(self) -> int:
        """Return the time now, which is never before one that was returned earlier."""
        return self._origin + self._pieces.running()

    def mark(self) -> Mark:
        """Return the mark from which the next start goes on."""
        running = self._pieces.running()
        return Mark(self._origin + running, running, self._pieces.boot)

    def resume(self, mark: Mark | None) -> None:
        """Go on from the mark of an earlier process. A store that has none yet begins by the wall clock: times in its
        records that lie ahead of that are of a clock that was wrong, and to go on from them would shorten lives."""
        wall, running = self._pieces.wall(), self._pieces.running()
        if mark is None:
            now = wall
        elif mark.boot and mark.boot == self._pieces.boot and mark.running <= running:
            now = mark.now + running - mark.running
        else:
            now = max(wall, mark.now + MARK_US)
        self._origin = now - running

    def behind(self) -> int:
        """Return by how many microseconds the time is behind a wall clock that has been ahead of it, by as much, for an
        hour; 0 otherwise. It notices that only where it is called every few seconds."""
        running = self._pieces.running()
        ahead = self._pieces.wall() - self._origin - running
        if abs(ahead - self._ahead) > TOLERANCE_US:
            self._ahead, self._since = ahead, running
        return ahead if self._ahead > TOLERANCE_US and running - self._since >= STEADY_US else 0

    def leap(self, microseconds: int) -> None:
        """Move the time forward at once. Rows that were stamped before `leapt`, and are not in the store yet, must be
        stamped anew."""
        self._origin += microseconds
        self._ahead, self._since = 0, self._pieces.running()
        self.leapt = self.now_us()
