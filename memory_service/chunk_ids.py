"""Ids of chunks. Owns the rule that none is used twice, not even after a power cut: they come from blocks that are
reserved durably before an id is used, also where commits are not durable otherwise."""

import threading
from concurrent.futures import Future

from sqlalchemy import Connection, update

from memory_service.schema import StoreRow
from memory_service.writer import Writer

BLOCK = 1024


class ChunkIds:
    """Monotonic, never reused, below 2^63. `first`: every id below it was given by an earlier process."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self._blocks: list[range] = []
        self._refill: Future[range] | None = None
        self.first = self.refill().result().start

    def take(self) -> int | None:
        """The next id; None when a `refill` must be awaited first. Never blocks."""
        with self._lock:
            if not self._blocks:
                return None
            block = self._blocks[0]
            self._blocks[:1] = [block[1:]] if len(block) > 1 else []
        if len(block) < BLOCK // 2:
            self.refill()
        return block[0]

    def refill(self) -> "Future[range]":
        """Reserve one more block, unless more than one is at hand or under way."""
        with self._lock:
            if self._refill is None or (self._refill.done() and len(self._blocks) < 2):
                self._refill = self._writer.submit(self._reserve, self._extend, durable=True)
            return self._refill

    @staticmethod
    def _reserve(connection: Connection) -> range:
        statement = update(StoreRow).values(next_chunk_id=StoreRow.next_chunk_id + BLOCK)
        end = connection.execute(statement.returning(StoreRow.next_chunk_id)).scalar_one()
        return range(end - BLOCK, end)

    def _extend(self, block: range) -> None:
        with self._lock:
            self._blocks.append(block)
