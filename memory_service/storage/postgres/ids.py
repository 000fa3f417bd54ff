"""The ids of chunks. This file owns the rule that no id is used twice, in whichever service: ids come in blocks from a
sequence of the database, which never goes back."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

from sqlalchemy import Connection

from memory_service.storage.postgres.database import Database, raw
from memory_service.storage.postgres.schema import BLOCK


class ChunkIds:
    """Gives ids, which ascend in this service and are never given twice in any. Threads share it."""

    def __init__(self, database: Database, submit: "Callable[[Callable[[], range]], Future[range]]") -> None:
        """Give ids of a database. submit: has a call made in a thread."""
        self._database = database
        self._submit = submit
        self._lock = threading.Lock()
        self._blocks: list[range] = []
        self._refill: Future[range] | None = None

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
        begin = self._database.change(_next, durable=True)
        block = range(begin, begin + BLOCK)
        with self._lock:
            self._blocks.append(block)
        return block


def _next(connection: Connection) -> int:
    row = raw(connection).execute("SELECT nextval('chunk_ids')").fetchone()
    assert row is not None
    return int(row[0])
