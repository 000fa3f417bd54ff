"""Giving the disk back what deleted chunks have left free in the database. Owns the rule that nobody waits long for it:
the pages are given back in transactions of their own, between those of others."""

import math
import threading
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection

from memory_service import cancellation
from memory_service.records import Records
from memory_service.schema import raw

INTERVAL_S = 10.0
# Of one transaction: four megabytes.
_PAGES = 1000
# By itself the service gives back what is more than a quarter of the database, and than sixteen megabytes.
_KEPT_PAGES, _KEPT_PART = 4096, 4
# In one run: neither what else is done every second nor the end of the service waits for all of a large database.
_STEPS = 25


class Sizes(NamedTuple):
    """Bytes of a database with its log, and of what is free in it."""

    taken: int
    free: int


class Vacuum:
    """The free pages of a store."""

    def __init__(self, records: Records, data: Path) -> None:
        self._records = records
        self._files = [data / f"metadata.db{suffix}" for suffix in ("", "-wal")]
        self._one_at_a_time = threading.Lock()

    def sizes(self) -> Sizes:
        """As of now."""
        with self._records.read() as connection:
            free, pages, size = _pages(connection)
        taken = sum(file.stat().st_size for file in self._files if file.exists())
        return Sizes(max(taken, (pages - free) * size), free * size)

    def run(self) -> None:
        """Give back some of what is much; what is little will be used again. To be called every INTERVAL_S."""
        with self._records.read() as connection:
            free, pages, _ = _pages(connection)
        if free > max(_KEPT_PAGES, pages // _KEPT_PART):
            self._give_back(range(_STEPS))

    def give_back(self) -> None:
        """Give back all that is free now. Blocks; once at a time. Errors: Cancelled, when the caller has gone."""
        self._give_back(count())

    def _give_back(self, steps: Iterable[int]) -> None:
        """Take these steps, while each leaves less than the one before."""
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
        """How many free pages are left."""
        return self._records.writer.submit(_give_back_some).result()


def _give_back_some(connection: Connection) -> int:
    # Each row is a page.
    raw(connection).execute(f"PRAGMA incremental_vacuum({_PAGES})").fetchall()
    return _pages(connection)[0]


def _pages(connection: Connection) -> tuple[int, int, int]:
    """Free pages, all pages, and bytes of a page."""
    asked = ("freelist_count", "page_count", "page_size")
    free, pages, size = (int(raw(connection).execute(f"PRAGMA {name}").fetchone()[0]) for name in asked)
    return free, pages, size
