"""The memory of a session's window: chunks of a turn that is not in the service yet are held back here.

This file owns two rules. A bank has nothing of a turn that never was: a chunk is written once the service has the turn
of its last token. And a bank has a chunk once, also where two workers write it: its key is made of its branch, its
offset and its tokens, so that a fork and its parent write the same chunk of what both of them have.
"""

import warnings
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import replace

import kvbank
from kvbank.wire.scalars import Scalar
from model_worker.remember.delivery import source_key
from model_worker.remember.memory import Memory
from model_worker.remember.service_link import AWAY
from model_worker.session.record import SessionRecord
from model_worker.window.capture import Captured
from model_worker.window.memory_port import Begun
from model_worker.window.recalled import RecalledChunk


class TurnMemory:
    """A memory as a window sees it (see `MemoryPort`), in front of the memory that writes to the bank.

    record: the session. kept: tokens of the session that are safe in the bank. held: chunks that wait for their turn,
    or for a service that is away.
    """

    def __init__(self, memory: Memory, record: SessionRecord):
        self.memory, self._record = memory, record
        self.chunk, self.cadence, self.needs_queries = memory.chunk, memory.cadence, memory.needs_queries
        self.query, self.query_tokens, self.recent = memory.query, memory.query_tokens, memory.recent
        self.ahead = memory.ahead
        self.kept = 0
        self.held: list[kvbank.NewChunk] = []
        self.follow()

    def follow(self) -> None:
        """Recall what belongs to the session from now on, which has other turns than before."""
        self.memory.filter = self._record.info.filter

    def recall(
        self, rows: Sequence[Sequence[int]], without: Sequence[Collection[RecalledChunk]] | None = None
    ) -> list[list[RecalledChunk]] | None:
        """Recall from the bank."""
        return self.memory.recall(rows, without)

    def ask(self, rows: Sequence[Sequence[int]], without: Sequence[Collection[RecalledChunk]] | None = None) -> Begun:
        """Begin a recall from the bank (see `Memory.ask`)."""
        return self.memory.ask(rows, without)

    def remember(self, rows: Sequence[Captured | None]) -> list[RecalledChunk | None]:
        """Hold what left the window, and write the part whose turns are there; return what attention may use of it."""
        made = self.memory.made(rows)
        self.held += [chunk for chunk in made if chunk is not None]
        self.release()
        return [self.memory.attended(chunk) for chunk in made]

    def release(self) -> None:
        """Write the chunks whose turns are in the service; a service that is away gets them later.

        Raises ServiceError with the memory's `strict` alone.
        """
        while self.held and (end := end_of(self.held[0])) <= self._record.tokens:
            if end > self.kept and not self._written(self.held[0]):
                return
            self.held.pop(0)
            self.kept = max(self.kept, end)

    def _written(self, chunk: kvbank.NewChunk) -> bool:
        """Write a chunk to the bank; return False where it is to be written later."""
        link, strict = self.memory.link, self.memory.settings.strict
        if not strict and not link.worth_trying():
            return False
        try:
            self.memory.store(self._marked(chunk))
        except AWAY as error:
            if strict:
                raise
            link.lost(error)
            return False
        except kvbank.ServiceError as error:
            if strict:
                raise
            self.memory.stats.dropped += 1
            warnings.warn(f"a chunk was not remembered: {error}", RuntimeWarning, stacklevel=2)
        return True

    def _marked(self, chunk: kvbank.NewChunk) -> kvbank.NewChunk:
        """Return a chunk with its key, and with the branch and the turn that it is of."""
        branch = branch_at(self._record.info, chunk.start)
        turns = self._record.turns
        turn = turns[bisect_right([turn.start for turn in turns], chunk.start) - 1]
        role = role_of(turn, chunk.start, end_of(chunk))
        key = source_key(branch, chunk.start, [int(token) for token in chunk.token_ids])
        marks: dict[str, Scalar] = {"branch": branch, "turn": turn.number, "role": role}
        return replace(chunk, metadata={**chunk.metadata, **marks}, **key)

    def left_before(self, start: int) -> list[RecalledChunk]:
        """Return the recent chunks before an offset, oldest first, with those that are held."""
        found = self.memory.left_before(start)
        held = (self.memory.attended(chunk) for chunk in self.held if chunk.start < start)
        first = {chunk.start: chunk for chunk in (*(chunk for chunk in held if chunk is not None), *found)}
        return [first[at] for at in sorted(first)[-self.recent :]] if self.recent else []


def end_of(chunk: kvbank.NewChunk) -> int:
    """Return the offset behind a chunk's last token."""
    return chunk.start + len(chunk.token_ids)


def branch_at(session: kvbank.Session, offset: int) -> str:
    """Return the branch to which a chunk belongs that begins at an offset of the session."""
    return next(
        stretch.branch for stretch in session.stretches if stretch.start_before is None or offset < stretch.start_before
    )


def role_of(turn: kvbank.Turn, begin: int, end: int) -> str:
    """Return who said the tokens of a turn between two offsets: `user`, `assistant` or `user+assistant`."""
    answer = turn.start + turn.prompt_tokens
    return "user" if end <= answer else "assistant" if begin >= answer else "user+assistant"
