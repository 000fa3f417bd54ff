"""LRU, least recently used: what was not retrieved for longest goes."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from model_worker.evaluate.eviction.policy import Policy, Run, kept


@dataclass
class Lru(Policy):
    """Evicts the chunks that were retrieved least recently, down to `target` percent of the capacity; 100 makes room
    for one chunk, as caches do it.

    A chunk that was never retrieved counts from its writing; of chunks that one retrieval has found, the older goes
    first.
    """

    target: int = 100

    name = "lru"
    about = "the least recently retrieved go (a policy of banks, which have target 50 unless told otherwise)"

    def begin(self, run: Run) -> None:
        """Start with an empty bank."""
        self._capacity = run.capacity
        self._order: OrderedDict[int, None] = OrderedDict()

    def written(self, chunk: int) -> None:
        """Learn that a chunk is used now."""
        self._order[chunk] = None

    def retrieved(self, chunks: Sequence[int], missed: Sequence[int]) -> None:
        """Learn that chunks are used now."""
        for chunk in chunks:
            self._order.move_to_end(chunk)

    def removed(self, chunk: int) -> None:
        """Forget a chunk that was removed."""
        del self._order[chunk]

    def room(self, chunk: int) -> list[int]:
        """Return the least recently used chunks."""
        too_many = len(self._order) - kept(len(self._order), self._capacity, self.target)
        return [self._order.popitem(last=False)[0] for _ in range(too_many)]
