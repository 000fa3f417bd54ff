"""LFU, least frequently used: what was retrieved least often goes, the older first among equals."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from model_worker.evaluate.eviction.policy import Policy, Run


@dataclass
class Lfu(Policy):
    """Evicts the chunk that was retrieved least often since it was written; of equal ones the oldest."""

    name = "lfu"
    about = "the least often retrieved goes, one at a time, the older first among equals"

    def begin(self, run: Run) -> None:
        """Start with an empty bank."""
        self._counts: dict[int, int] = {}
        # Counts with their chunks, the least first; what is not up to date is passed over.
        self._least: list[tuple[int, int]] = []

    def written(self, chunk: int) -> None:
        """Learn that a chunk is there, and was never retrieved."""
        self._counts[chunk] = 0
        heappush(self._least, (0, chunk))

    def retrieved(self, chunks: Sequence[int], missed: Sequence[int]) -> None:
        """Count each retrieval of a chunk."""
        for chunk in chunks:
            self._counts[chunk] += 1
            heappush(self._least, (self._counts[chunk], chunk))

    def removed(self, chunk: int) -> None:
        """Forget a chunk that was removed."""
        del self._counts[chunk]

    def room(self, chunk: int) -> list[int]:
        """Return the least often retrieved chunk."""
        while True:
            count, least = heappop(self._least)
            if self._counts.get(least) == count:
                del self._counts[least]
                return [least]
