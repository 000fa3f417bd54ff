"""A memory that recalls only of the last N tokens before the window, from a bank that holds more than that.

So one bank, read once, stands for memories of several sizes, and does not find what comes later in the text. The
result is that of a bank bounded in tokens whose oldest chunks go first, such as one of policy `lru` whose recalls do
not count; only that a bank evicts whole chunks.
"""

from collections.abc import Collection, Sequence

import kvbank
from model_worker.remember import stored
from model_worker.remember.memory import Memory
from model_worker.window.capture import Captured
from model_worker.window.recalled import RecalledChunk


class MemorySpan:
    """The port of a window to a part of a memory: chunks that left the window are found, and none is written.

    memory: over a bank of one name, in which the whole text stands. left: tokens of the text that have left the window
    so far. size: how many of them may be found, the last ones; None is all, 0 none. The last `recent` chunks that left
    are attended to always, as the memory's settings say, and are not found beside that.
    """

    needs_queries = False  # nothing is written
    recent = 0  # of the window: recent chunks come with each recall, which is due at each block

    def __init__(self, memory: Memory, left: int, size: int | None = None):
        assert isinstance(memory.bank, str)
        self.memory, self.left, self.size = memory, left, size
        self.chunk, self.cadence = memory.chunk, memory.cadence
        self.query_tokens, self.query = memory.query_tokens, memory.query
        self._recent: list[RecalledChunk] = []
        self._most_recent = memory.recent
        if self._most_recent:
            self._note_recent(max(0, left - 2 * self._most_recent * self.chunk))  # chunks may be shorter

    def remember(self, rows: Sequence[Captured | None]) -> None:
        """Note how far the window has come; its chunks stand in the bank already."""
        for captured in rows:
            if captured is not None:
                self.left = max(self.left, captured.start + len(captured))
                if self._most_recent:
                    self._note_recent(captured.start)

    def recall(
        self, rows: Sequence[Sequence[int]], without: Sequence[Collection[RecalledChunk]] | None = None
    ) -> list[list[RecalledChunk]] | None:
        """Return chunks for each row's query, of the last `size` tokens that left the window, and the recent ones."""
        first = 0 if self.size is None else max(0, self.left - self.size)
        before = self._recent[0].start if self._recent else self.left
        if first >= before:
            return [list(self._recent) for _ in rows]
        self.memory.filter = kvbank.Filter(start_from=first, start_before=before)
        found = self.memory.recall(rows)
        return None if found is None else [[*own, *self._recent] for own in found]

    def _note_recent(self, start: int) -> None:
        """Fetch the chunks from `start` on that have left the window, and keep the most recent ones."""
        memory, bank = self.memory, str(self.memory.bank)
        if start >= self.left:
            return
        span = kvbank.Filter(start_from=start, start_before=self.left)
        ids = [chunk.chunk_id for chunk in memory.client.list_chunks(bank, filter=span)]
        found = memory.client.fetch(bank, ids, reader_digest=memory.attachment.reader.digest, tensors="torch")
        for chunk in found:
            assert chunk.tensors is not None
            layers = stored.layers_of(chunk.tensors, memory.attachment)
            self._recent.append(RecalledChunk(chunk.chunk_id, chunk.start, layers, chunk.token_ids))
        self._recent = self._recent[-self._most_recent :]


class OtherMemory(MemorySpan):
    """The port of a window to the memory of another text, all of whose chunks may be found."""

    def __init__(self, memory: Memory):
        super().__init__(memory, 0)
        self._most_recent = 0

    def recall(
        self, rows: Sequence[Sequence[int]], without: Sequence[Collection[RecalledChunk]] | None = None
    ) -> list[list[RecalledChunk]] | None:
        """Return chunks of the other text for each row's query."""
        return self.memory.recall(rows)
