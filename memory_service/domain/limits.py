"""Figures and points that a test sets otherwise than the service does. This file owns that they are handed in from the
top (`open_engine`, `Server`), so that no test has to patch a module that goes by them.

A user sets none of these: what users set is in `memory_service.settings`.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

Point = Literal["expiry", "evictions", "clearing", "counts"]


@dataclass(frozen=True, slots=True)
class IndexLimits:
    """Figures that an index goes by, in rows (vectors) unless they say otherwise."""

    # The rows to which the last segment grows; where vectors are long it has fewer.
    tail_rows: int = 8192
    # Where a filter lets pass at most one of so many rows, these are read and scored without a search.
    read_one_of: int = 1000
    # The rows of a sealed segment that is made when an index is loaded, and of one that counts as small.
    segment_rows: int = 65_536
    small_rows: int = 8192
    # So many small segments are merged into one.
    most_small: int = 8
    # Fewer rows are not worth the training of lists.
    fewest_in_lists: int = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Figures that the service goes by. Times are in seconds."""

    # Rows that one step of an eviction, of a removal, or of the clearing of a deleted bank takes, so that no write
    # waits long for the writer.
    step_rows: int = 250
    # Evictions that the log of a bank keeps.
    eviction_log: int = 10_000
    # Between two tries to go on with an eviction that could not be written; the pause doubles up to the longest one.
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    # Between two looks at what has expired, at the wall clock, and at evictions that could not be written.
    expiry_s: float = 1.0
    # Between two looks at the free pages of the database, and the free pages that are always left to it.
    vacuum_s: float = 10.0
    kept_pages: int = 4096
    # Between two looks at the storage, whose health is told.
    probe_s: float = 5.0
    # That a connection to /metrics, /healthz or /readyz may take, from its first byte to its last.
    http_patience_s: float = 10.0
    # That a caller may be behind the least rate of bytes while others wait for room in memory.
    stalled_s: float = 20.0
    # Payload files that all answers together hold open; those beyond it are opened when their turn comes.
    open_files: int = 512
    # Request ids that are remembered (34 MiB). At more than 660 retrievals a second the oldest are forgotten sooner.
    requests_remembered: int = 200_000
    index: IndexLimits = IndexLimits()


INDEX, STANDARD = IndexLimits(), Limits()


@dataclass(frozen=True, slots=True)
class Pauses:
    """Points that the service passes, by name. By default none of them does anything.

    left_out: work in the background that is not done, so that a test sees the time before it. at: what is called when
    the service passes a point, in the thread that passes it.
    """

    left_out: Set[Point] = frozenset()
    at: Mapping[str, Callable[[], object]] = field(default_factory=dict)

    def leaves_out(self, point: Point) -> bool:
        """Tell whether the work of this name is not to be done."""
        return point in self.left_out

    def reach(self, point: str) -> None:
        """Pass the point of this name; where a test waits at it, this returns when the test goes on."""
        if (action := self.at.get(point)) is not None:
            action()


NO_PAUSES = Pauses()
