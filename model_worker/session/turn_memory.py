"""The memory of a session's window: what belongs to a turn that is not in the log yet is held back here.

This file owns the rule that a bank has nothing of a turn that never was: a chunk goes to the bank once the log covers
its last token.
"""

from collections.abc import Collection, Sequence

import kvbank
from model_worker.remember.memory import Memory
from model_worker.window.capture import Captured
from model_worker.window.recalled import RecalledChunk


class TurnMemory:
    """A memory as a window sees it (see `MemoryPort`), in front of the memory that writes to the bank.

    durable: tokens that are in the log. kept: tokens that are safe in the bank or its spool. held: chunks that wait for
    the log.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        self.chunk, self.cadence, self.needs_queries = memory.chunk, memory.cadence, memory.needs_queries
        self.query, self.query_tokens, self.recent = memory.query, memory.query_tokens, memory.recent
        self.durable = self.kept = 0
        self.held: list[kvbank.NewChunk] = []

    def recall(
        self, rows: Sequence[Sequence[int]], without: Sequence[Collection[RecalledChunk]] | None = None
    ) -> list[list[RecalledChunk]] | None:
        """Recall from the bank."""
        return self.memory.recall(rows, without)

    def remember(self, rows: Sequence[Captured | None]) -> list[RecalledChunk | None]:
        """Hold what left the window, and write the part that the log covers; return what attention may use of it."""
        made = self.memory.made(rows)
        self.held += [chunk for chunk in made if chunk is not None]
        self.release(self.durable)
        return [self.memory.attended(chunk) for chunk in made]

    def release(self, durable: int) -> None:
        """Write the chunks that the log covers, which has `durable` tokens now."""
        self.durable = durable
        while self.held and self.held[0].start + len(self.held[0].token_ids) <= durable:
            self.memory.write(self.held[0])
            chunk = self.held.pop(0)
            self.kept = chunk.start + len(chunk.token_ids)
