"""Retrievals that are counted in this service until they are written, once a second."""

import threading
from collections.abc import Mapping
from functools import partial

from memory_service.domain.limits import Pauses
from memory_service.storage.base import Retrievals
from memory_service.storage.chunks.counts import Counts
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.rows import use_rows


class Counting:
    """Counts retrievals by chunk id. Threads share it."""

    def __init__(self, database: Database, counts: Counts, pauses: Pauses) -> None:
        self._database = database
        self._pauses = pauses
        self.counts = counts
        self._writing = threading.Lock()

    def add(self, counted: Mapping[int, Retrievals]) -> None:
        """Add retrievals, which are written within a second."""
        self.counts.add(counted)

    def write(self) -> None:
        """Write what was counted so far. Errors: those of the database, after which it is tried again."""
        if self._pauses.leaves_out("counts") or not (self.counts or self.counts.under_way):
            return
        with self._writing:
            if not (taken := self.counts.take()):
                return
            try:
                self._database.change(partial(use_rows.add, counted=taken), durable=False)
            except BaseException:
                self.counts.restore()
                raise
            self.counts.settle()
