"""A memory that only writes: the port of a window whose text is read to be remembered, and that recalls nothing."""

from collections.abc import Collection, Sequence

from model_worker.remember.behind import Behind
from model_worker.remember.memory import Memory
from model_worker.window.capture import Captured
from model_worker.window.recalled import RecalledChunk


class Filling:
    """The port of a window that writes what leaves it, and recalls nothing.

    behind: stores chunks while the model reads on, for a window of one row; None to store each before the model goes
    on. begin: offset in the source before which nothing is written, since it is stored already.
    """

    recent = 0

    def __init__(self, memory: Memory, behind: Behind | None = None, begin: int = 0):
        self.memory, self._behind, self._begin = memory, behind, begin
        self.chunk, self.cadence = memory.chunk, memory.cadence
        self.query_tokens, self.query = memory.query_tokens, memory.query

    @property
    def needs_queries(self) -> bool:
        """Tell whether the compressor reads queries, so that the cache keeps them."""
        return self.memory.needs_queries

    def remember(self, rows: Sequence[Captured | None]) -> None:
        """Write what left the window; nothing of it is kept for attention."""
        new = [row if row is not None and row.start >= self._begin else None for row in rows]
        if self._behind is None:
            self.memory.fill(new)
            return
        for captured in new:
            if captured is not None:
                self._behind.take(captured)

    def recall(self, rows: Sequence[Sequence[int]], without: Sequence[Collection[RecalledChunk]] | None = None) -> None:
        """Recall nothing, so that what is stored does not depend on the size of a memory."""
