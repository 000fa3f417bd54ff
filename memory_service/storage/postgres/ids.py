"""The ids of chunks. This file owns the rule that no id is used twice, in whichever service: ids come in blocks from a
sequence of the database. That goes back only where the database was put back to an earlier time, or has lost its last
transactions: a service that notices this sets the sequence far beyond all ids that it knows."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from sqlalchemy import Connection

from memory_service.storage.postgres.database import Database, raw
from memory_service.storage.postgres.schema import BLOCK, IDS_LOCK

# How far beyond: more blocks than other services can have taken after this one.
_BEYOND = 1024 * BLOCK


class ChunkIds:
    """Gives ids, which ascend in this service and are never given twice in any. Threads share it."""

    def __init__(self, database: Database, submit: "Callable[[Callable[[], range]], Future[range]]") -> None:
        """Give ids of a database. submit: has a call made in a thread."""
        self._database = database
        self._submit = submit
        self._lock = threading.Lock()
        self._blocks: list[range] = []
        self._refill: Future[range] | None = None
        # The largest id of a block of this service.
        self._known = 0

    def forget(self) -> None:
        """Give none of the ids that are at hand: the database may have lost that they were taken."""
        with self._lock:
            self._blocks.clear()

    def take(self) -> int | None:
        """Return the next id; None when a `refill` must be awaited first. Never blocks."""
        with self._lock:
            if not self._blocks:
                return None
            block = self._blocks[0]
            self._blocks[:1] = [block[1:]] if len(block) > 1 else []
        if len(block) < BLOCK // 2:
            self.refill()
        return block[0]

    def refill(self) -> "Future[range]":
        """Take one more block, unless more than one is at hand or under way."""
        with self._lock:
            if self._refill is None or (self._refill.done() and len(self._blocks) < 2):
                self._refill = self._submit(self._next_block)
            return self._refill

    def _next_block(self) -> range:
        # The sequence says in the log of the database that a block is taken, and the commit waits for that.
        begin = self._database.change(partial(_next, known=self._known), durable=True)
        block = range(begin, begin + BLOCK)
        with self._lock:
            self._known = max(self._known, block[-1])
            self._blocks.append(block)
        return block


def _next(connection: Connection, known: int) -> int:
    """Return the first id of a block. known: an id that is below the block."""
    driver, begin = raw(connection), 0
    while begin <= known:
        if begin:
            # One after the other: the sequence would go back where one service sets it behind another one.
            driver.execute(f"SELECT pg_advisory_xact_lock({IDS_LOCK})")
            driver.execute(
                "SELECT setval('chunk_ids', %(beyond)s) FROM chunk_ids WHERE last_value < %(beyond)s",
                {"beyond": known + 1 - known % BLOCK + _BEYOND},
            )
        row = driver.execute("SELECT nextval('chunk_ids')").fetchone()
        assert row is not None
        begin = int(row[0])
    return begin
