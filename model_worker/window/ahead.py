"""A recall that is asked for before it is due, so that no forward stands still for the service.

The way of the data: While text is written, a recall is due every `cadence` tokens. `ahead` tokens before one is due, as
the forward of a token begins, the memory is asked for the last tokens that are known at that moment. A thread of the
memory puts the question to the service, while the model writes on. The forward for which the recall is due takes the
answer, and waits where that is not there yet: what a text attends to follows from its tokens alone, and not from how
quick a service is. A prompt that comes in meanwhile asks for itself: the answer is dropped, and so is the question
where the thread has not begun with it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from model_worker.window.memory_port import Answer, AskedAhead, Begun, MemoryPort
from model_worker.window.recalled import RecalledChunk


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that was put to a memory. rows: its token ids. answer: waits for what `recall` returns or raises."""

    rows: list[list[int]]
    answer: Answer


class Ahead:
    """The one question of a window that is under way, if its memory may be asked ahead."""

    def __init__(self, memory: MemoryPort | None):
        self._memory = memory if isinstance(memory, AskedAhead) and memory.ahead else None
        self._rows: list[list[int]] = []
        self._begun: Begun | None = None

    @property
    def tokens(self) -> int:
        """Return how many tokens before a recall is due its question is asked; 0 where it is asked when due, or where
        one is under way already."""
        return 0 if self._memory is None or self._begun is not None else self._memory.ahead

    def ask(self, rows: list[list[int]], without: Sequence[Collection[RecalledChunk]] | None) -> None:
        """Put a question to the memory. rows, without: as in `MemoryPort.recall`."""
        assert self._memory is not None
        self._rows, self._begun = rows, self._memory.ask(rows, without)

    @property
    def unanswered(self) -> Begun | None:
        """Return the recall that is under way, if it has no answer yet."""
        return None if self._begun is None or self._begun.done() else self._begun

    def take(self) -> Asked | None:
        """Return the question that is under way, which is so no more; None where there is none."""
        begun, self._begun = self._begun, None
        return None if begun is None else Asked(self._rows, begun.result)

    def drop(self) -> None:
        """Give up the question that is under way; what the memory answers is not used."""
        if self._begun is not None:
            self._begun.cancel()
        self._begun = None
