"""What a reading stores: made and written in the memory's line, while the model reads on.

The way of the data: What leaves the window is collected until it has as many tokens as `_TOGETHER`. Then the memory's
line sees once that the model is still the one that the memory was opened with, which takes a look at every byte of its
weights; it compresses, embeds and writes the chunks, in the order of the text. Chunks are counted as read before they
are written, and `settle` waits for all of them. At most two such groups are under way, so that a reading needs little
more memory than its window. Where one chunk cannot be stored, none behind it is.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

from model_worker.remember.memory import Memory
from model_worker.window.capture import Captured
from model_worker.window.memory_port import Answer

# Tokens of the chunks that are made together: with more, a reading would hold more than a usual window; with fewer, it
# would look at the weights more often.
_TOGETHER = 256
# Groups that are under way at most.
_MOST = 2


class Behind:
    """Stores the chunks of one reading in their order, in the line of the memory that takes them."""

    def __init__(self, memory: Memory):
        self._memory = memory
        self._collected: list[_Chunk] = []
        self._under_way: deque[Future[None]] = deque()
        self._failed = False

    def take(self, captured: Captured, question: Answer | None = None) -> None:
        """Store a chunk in the memory's line. Raises what storing an earlier one has raised.

        question: a recall that is made before the chunk is stored, and counts; its answer is not needed.
        """
        self._collected.append(_Chunk(captured, self._memory.text(captured.token_ids), question))
        if sum(len(chunk.captured) for chunk in self._collected) >= _TOGETHER:
            self._hand_over()

    def settle(self) -> None:
        """Wait until all chunks are stored. Raises what storing one of them has raised."""
        self._hand_over()
        while self._under_way:
            self._await_oldest()

    def _hand_over(self) -> None:
        """Give what was collected to the line, which has one group at work and one that waits at most."""
        while len(self._under_way) >= _MOST or (self._under_way and self._under_way[0].done()):
            self._await_oldest()
        group, self._collected = self._collected, []
        if group:
            self._under_way.append(self._memory.line.begin(partial(self._store, group)))

    def _await_oldest(self) -> None:
        """Wait for the oldest group that is under way, which an interrupt leaves there. Raises what storing it has
        raised."""
        wait([self._under_way[0]])
        self._under_way.popleft().result()

    def _store(self, group: Sequence["_Chunk"]) -> None:
        """Store the chunks of a group one after the other, unless storing one before them has failed."""
        if self._failed:
            return
        self._failed = True
        self._memory.attachment.check_unchanged(whole=True)
        for chunk in group:
            if chunk.question is not None:
                chunk.question()
            self._memory.write(self._memory.new_chunk(chunk.captured, chunk.text))
        self._failed = False


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk that left the window. text: of its tokens, decoded where it left, since tokenizers refuse two threads."""

    captured: Captured
    text: str
    question: Answer | None
