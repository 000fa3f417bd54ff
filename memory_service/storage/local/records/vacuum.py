"""Free pages, which deleted chunks leave in the database, are given back to the disk. This file owns the rule that
no request waits long for that: it is done in short transactions, between those of others."""

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from sqlalchemy import Connection

from memory_service.domain import cancellation
from memory_service.domain.limits import Limits
from memory_service.storage.base import Sizes
from memory_service.storage.local.records.records import Records
from memory_service.storage.local.records.schema import raw

# Pages that one transaction gives back: four megabytes.
_PAGES = 1000
# Unasked, the service gives pages back when more than a quarter of the database is free, and more than
# `Limits.kept_pages`.
_KEPT_PART = 4
# Transactions of one run, so that neither the janitor nor the end of the service waits for all of a large database.
_STEPS = 25


class Vacuum:
    """Gives the free pages of a store back to the disk."""

    def __init__(self, records: Records, data: Path, limits: Limits) -> None:
        self._records = records
        self._kept_pages = limits.kept_pages
        self._files = [data / f"metadata.db{suffix}" for suffix in ("", "-wal")]
        self._one_at_a_time = threading.Lock()

    def sizes(self) -> Sizes:
        """Measure the database with its log, and how much of it is free."""
        with self._records.read() as connection:
            free, pages, size = _pages(connection)
        taken = sum(file.stat().st_size for file in self._files if file.exists())
        return Sizes(max(taken, (pages - free) * size), free * size)

    def run(self) -> None:
        """Give back some pages where many are free; few will be used again anyway. Call this every INTERVAL_S."""
        with self._records.read() as connection:
            free, pages, _ = _pages(connection)
        if free > max(self._kept_pages, pages // _KEPT_PART):
            self._give_back(range(_STEPS))

    def give_back(self) -> None:
        """Give back all pages that are free now. Blocks, also while another caller does the same. Errors: Cancelled."""
        self._give_back(count())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let no page be moved while the block runs."""
        with self._one_at_a_time:
            yield

    def _give_back(self, steps: Iterable[int]) -> None:
        """Give back pages in as many steps as given, while each step leaves fewer than the one before."""
        with self._one_at_a_time:
            before: float = math.inf
            for _ in steps:
                cancellation.check()
                left = self._step()
                if not 0 < left < before:
                    break  # done, or more is freed than is given back; the rest is for the next time
                before = left
            self._records.writer.checkpoint().result()

    def _step(self) -> int:
        """Give back some pages, and return how many free ones are left."""
        return self._records.writer.submit(_give_back_some).result()


def _give_back_some(connection: Connection) -> int:
    # SQLite gives back one page for each row that is fetched.
    raw(connection).execute(f"PRAGMA incremental_vacuum({_PAGES})").fetchall()
    return _pages(connection)[0]


def _pages(connection: Connection) -> tuple[int, int, int]:
    """Return how many pages are free, how many there are, and the bytes of a page."""
    asked = ("freelist_count", "page_count", "page_size")
    free, pages, size = (int(raw(connection).execute(f"PRAGMA {name}").fetchone()[0]) for name in asked)
    return free, pages, size
